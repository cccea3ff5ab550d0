"""Run a recipe as `launch/train.py` does, and write down what the trainer really was: `job.py FACTS.json recipe`."""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import bridge_rl.run
from bridge_rl.cli import main
from bridge_rl.rollout.ranks import is_sharded
from bridge_rl.trainer import BridgeGRPOTrainer


class Probed(BridgeGRPOTrainer):
    sharded_while_sampling = None

    @contextmanager
    def model_for_sampling(self):
        with super().model_for_sampling() as model:
            self.sharded_while_sampling = is_sharded(model)
            yield model

    def train(self, *args, **kwargs):
        result = super().train(*args, **kwargs)
        parameter = next(
            p for name, p in self.model.named_parameters() if name.endswith("layers.0.bridge.qkv_proj.weight")
        )
        shard = getattr(parameter, "ds_tensor", parameter)
        plugin = self.accelerator.state.deepspeed_plugin
        facts = {
            "distributed_type": str(self.accelerator.distributed_type.value),
            "num_processes": self.accelerator.num_processes,
            "zero_stage": None if plugin is None else plugin.zero_stage,
            "shard_elements": shard.numel(),
            "sharded_while_sampling": self.sharded_while_sampling,
            "steps": [entry for entry in self.state.log_history if "loss" in entry],
        }
        if self.accelerator.is_main_process:
            Path(sys.argv[1]).write_text(json.dumps(facts))
        return result


bridge_rl.run.BridgeGRPOTrainer = Probed

if __name__ == "__main__":
    main(["train", *sys.argv[2:]])
