"""The run of test_tensor_parallel.py. Usage, under torchrun: tensor_parallel_run.py MODEL_FOLDER..."""

import sys

import torch
from torch import distributed
from transformers import AutoModelForCausalLM

import hfllm  # noqa: F401


def main(folders: list[str]) -> None:
    distributed.init_process_group("gloo")
    mesh = distributed.init_device_mesh("cpu", (distributed.get_world_size(),), mesh_dim_names=("tp",))
    ids = torch.arange(10, 30).unsqueeze(0)
    for folder in folders:
        whole = AutoModelForCausalLM.from_pretrained(folder)
        split = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", device_mesh=mesh)
        logits = split(ids).logits
        logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
        rows = split.model.layers[0].self_attn.q_proj.weight
        rows = rows.to_local() if hasattr(rows, "to_local") else rows
        difference = (logits - whole(ids).logits).abs().max().item()
        if distributed.get_rank() == 0:
            print("RESULT", len(rows) / len(whole.model.layers[0].self_attn.q_proj.weight), difference)
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
