"""One process of two: biases after steps on half of each batch, and in one of them after whole batches."""

import sys
from pathlib import Path

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import hfllm

sys.path.insert(0, str(Path(__file__).parent.parent))
from families import FAMILIES


def biases(batches, wrap, half):
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = hfllm.HfllmForCausalLM(hfllm.HfllmConfig(**sizes, **FAMILIES["glm4-moe"])).train()
    # Weights stay as they are: alike whatever the order of sums.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    wrapped = wrap(model)
    for batch in batches:
        for rows in batch.split(2) if half is None else [batch[half]]:
            wrapped(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.model.layers[1].mlp.gate.e_score_correction_bias


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    batches = torch.randint(10, 300, (3, 4, 12), generator=torch.Generator().manual_seed(0))
    half = slice(2 * rank, 2 * rank + 2)
    shared = biases(batches, lambda model: DistributedDataParallel(model, find_unused_parameters=True), half)
    torch.save(shared, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        torch.save(biases(batches, lambda model: model, None), folder / "whole.pt")


main(Path(sys.argv[1]))
