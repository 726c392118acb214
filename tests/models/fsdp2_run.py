"""The run of test_remote_code.py. Usage, under torchrun: fsdp2_run.py FOLDER...; each is sharded and saved beside it.

accelerate shards by FSDP2 on GPUs only and falls back to DDP on a CPU: it is told here what it would find out there.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import distributed
from torch.distributed.fsdp import FSDPModule

from hfllm.models.family import modeling_hfllm, modeling_hfllm_vision


def main(folders: list[str]) -> None:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        state_dict_type="FULL_STATE_DICT",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True)
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    for folder in folders:
        name = json.loads((Path(folder) / "config.json").read_text())["architectures"][0]
        of_family = modeling_hfllm if hasattr(modeling_hfllm, name) else modeling_hfllm_vision
        model = getattr(of_family, name).from_pretrained(folder)
        optimizer = torch.optim.SGD(model.parameters())
        model, _ = accelerator.prepare(model, optimizer)
        assert isinstance(model, FSDPModule) and type(model).__name__ == f"FSDP{name}", type(model)
        accelerator.unwrap_model(model).save_pretrained(
            f"{folder}-sharded",
            state_dict=accelerator.get_state_dict(model),
            is_main_process=accelerator.is_main_process,
        )
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
