"""`bridge-rl doctor`: what is installed, what this machine can do, and whether the embedded model samples."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from accelerate import PartialState

from bridge_rl.config import ModelSection
from bridge_rl.models import load_model, load_tokenizer
from bridge_rl.rollout import SamplingParams, generate_groups
from bridge_rl.verify import verify_answers

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "datasets", "math-verify", "wandb")
OF_EXTRAS = ("bitsandbytes", "fastapi", "lm-eval", "reasoning-gym", "uvicorn")


def doctor() -> None:
    """Print versions and devices, then try sampling and verifying."""
    print(f"python {platform.python_version()} on {platform.platform()}")
    for name in PACKAGES + OF_EXTRAS:
        try:
            print(f"{name} {version(name)}")
        except PackageNotFoundError:  # an extra, or deepspeed where it is not for
            print(f"{name} is not installed")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            print(f"GPU {index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    else:
        print(f"no GPU; {torch.get_num_threads()} CPU threads")
    section = ModelSection("package://bridge_rl/tiny/model")
    model, tokenizer = load_model(section).to(PartialState().device), load_tokenizer(section)
    prompt = tokenizer("<bos>12,35,27,19,31,22:49=")["input_ids"]
    [group] = generate_groups(model, [prompt], 2, SamplingParams(32))
    print(f"sampling: {tokenizer.decode(group.tokens[0], skip_special_tokens=True)}")
    [verdict] = verify_answers([r"\boxed{\frac{1}{2}}"], ["0.5"], timeout_s=30)
    print(f"verifier: {verdict.status}, 1/2 = 0.5 is {verdict.correct}")
