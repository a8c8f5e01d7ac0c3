"""One training step of a tiny Llama under each accelerate config that is named, by FSDP in one process on a CPU.

Prints, for each config, how often each layer began, and how far the gradients are from those without FSDP, where layers
have dropout and where they have none. accelerate has FSDP for GPUs alone, so it is told that the CPU is one; the config
goes to it through its own launcher's parser, environment and plugin.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter

os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")

import torch
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}

WRAPPERS: set[str] = set()
"""The types of all modules of the models that were prepared."""


def step(accelerator: Accelerator | None, dropout: float) -> tuple[Counter[int], list[torch.Tensor]]:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SIZES, num_key_value_heads=2, attention_dropout=dropout)
    model = AutoModelForCausalLM.from_config(config).train()
    if accelerator is not None:
        model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
        WRAPPERS.update(type(module).__name__ for module in model.modules())
    runs: Counter[int] = Counter()
    for number, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_pre_hook(lambda *call, number=number: runs.update([number]))
    torch.manual_seed(1)
    ids = torch.arange(32).reshape(2, 16)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    grads = [parameter.grad for parameter in model.parameters()]
    return runs, [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]


def apart(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    return max(float((one - other).norm() / other.norm()) for one, other in zip(ours, theirs, strict=True))


def under(config: str, plain: dict[float, list[torch.Tensor]]) -> dict[str, object]:
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", config, "train.py"]))
    for name in [name for name in os.environ if name.startswith("FSDP_")]:
        del os.environ[name]
    told = prepare_multi_gpu_env(args)
    os.environ.update({name: value for name, value in told.items() if name.startswith(("FSDP_", "ACCELERATE_"))})
    AcceleratorState._reset_state()
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    accelerator = Accelerator()
    WRAPPERS.clear()
    steps = {dropout: step(accelerator, dropout) for dropout in plain}
    return {
        "is_fsdp2": accelerator.is_fsdp2,
        "mixed_precision": accelerator.mixed_precision,
        "offloads": "OffloadWrapper" in WRAPPERS,
        "runs": steps[0.0][0],
        "apart": {str(dropout): apart(grads, plain[dropout]) for dropout, (_, grads) in steps.items()},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    store = torch.distributed.TCPStore("127.0.0.1", 0, 1, is_master=True)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    PartialState(cpu=True)
    without = {dropout: step(None, dropout)[1] for dropout in (0.0, 0.5)}
    print(json.dumps({config: under(config, without) for config in sys.argv[1:]}))
