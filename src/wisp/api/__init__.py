"""The OpenAI surface: schemas, chat templates, text, SSE, errors and routes, shared by edge, verifier and router."""
