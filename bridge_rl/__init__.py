"""Train language models whose parallel samples think together (Bridge, arXiv 2510.01143)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from bridge_rl.block import BridgeConfig
    from bridge_rl.checkpoint import load_bridge, save_bridge
    from bridge_rl.evaluation.metrics import g_pass_at_k, majority_vote, pass_at_k
    from bridge_rl.rollout import Group, RolloutOptions, SamplingParams, generate_groups, group_logprobs
    from bridge_rl.surgery import attach_bridge, bridge_parameters, disable_bridge
    from bridge_rl.verify import Verdict, verify_answers

_HOME = {
    "BridgeConfig": "block",
    "Group": "rollout",
    "RolloutOptions": "rollout",
    "SamplingParams": "rollout",
    "Verdict": "verify",
    "attach_bridge": "surgery",
    "bridge_parameters": "surgery",
    "disable_bridge": "surgery",
    "g_pass_at_k": "evaluation.metrics",
    "generate_groups": "rollout",
    "group_logprobs": "rollout",
    "load_bridge": "checkpoint",
    "majority_vote": "evaluation.metrics",
    "pass_at_k": "evaluation.metrics",
    "save_bridge": "checkpoint",
    "verify_answers": "verify",
}
__all__ = [
    "BridgeConfig",
    "Group",
    "RolloutOptions",
    "SamplingParams",
    "Verdict",
    "attach_bridge",
    "bridge_parameters",
    "disable_bridge",
    "g_pass_at_k",
    "generate_groups",
    "group_logprobs",
    "load_bridge",
    "majority_vote",
    "pass_at_k",
    "save_bridge",
    "verify_answers",
]


def __getattr__(name: str) -> Any:
    """Import on first use: `bridge-rl --help` and a recipe's check do not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'bridge_rl' has no attribute {name!r}")
    return getattr(import_module(f"bridge_rl.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
