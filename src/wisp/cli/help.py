"""How help looks: the many options of servers in panels, and variables named by their rule, not one by one."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup, TyperOption

PANELS = {
    "Network": (
        "host", "port", "server", "api_keys", "tls_cert", "tls_key", "allowed_hosts", "cors_origins",
        "http_keep_alive_s", "keep_alive_s", "give_up_s",
    ),
    "API": ("slo_classes", "served_model_name", "tool_parser"),
    "Scheduling": ("batching", "depth", "history_tokens", "cost", "max_sessions", "park_s", "slo_admission"),
    "Engine": (
        "slots", "context", "threads", "kv_type", "gpu_layers", "flash_attention", "tensor_split", "batch_rows",
        "tensor_parallel", "gpu_memory", "runner", "quantization", "prefix_caching",
    ),
    "Emulated engine": ("kv_tokens", "traces", "output_tokens", "acceptance"),
    "Replicas": ("replicas", "launcher", "gpus_per_replica"),
    "Process": ("drain_s", "event_log", "offline", "log_level", "log_format"),
}  # fmt: skip
PANEL_OF = {name: panel for panel, names in PANELS.items() for name in names}
SERVERS = ("serve", "edge")


class Commands(TyperGroup):
    """All commands of `wisp`."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        _describe(self, "WISP")

    def get_params(self, ctx: Any) -> list[Any]:
        """Its own options. Of those only --config is taken from a variable: WISP_VERSION may be anyone's."""
        found = super().get_params(ctx)
        for option in found:
            if isinstance(option, TyperOption):
                option.show_envvar = False
                option.allow_from_autoenv = option.name == "config"
        return found


def _describe(group: Any, prefix: str) -> None:
    for name, command in group.commands.items():
        within = f"{prefix}_{name.replace('-', '_').upper()}"
        if hasattr(command, "commands"):
            _describe(command, within)
            continue
        options = [p for p in command.params if isinstance(p, TyperOption)]
        for option in options:
            option.show_envvar = False
            if name in SERVERS:
                option.rich_help_panel = PANEL_OF.get(option.name or "")
        if options:
            first = options[0]
            variable = f"{within}_{(first.name or '').upper()}"
            command.epilog = (
                f"Each option has an environment variable: {variable} for {first.opts[0]}, and so on."
            )
