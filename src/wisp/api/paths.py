"""The paths of a server that WISP's own processes ask for, each in one place for who serves it and who asks."""

SESSION_PATH = "/v1/sessions"
TOKENIZER_PATH = "/v1/tokenizers"  # a fingerprint follows
STATUS_PATH = "/v1/status"
REPLICAS_PATH = "/v1/replicas"
