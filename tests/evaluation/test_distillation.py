"""The figures of a teacher and its student are their definitions, and need no more memory than the trainer's loss."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM, OPTConfig, OPTForCausalLM

from hfllm.evaluation import before_after
from hfllm.evaluation.before_after import fit_metrics

VOCABULARY, ROWS, LENGTH, CHUNK = 200, 6, 12, 5


class Largest(TorchDispatchMode):
    """The most rows of logits that any operation returns."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and value.shape[-1:] == (VOCABULARY,):
                self.rows = max(self.rows, value.numel() // VOCABULARY)
        return result


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCABULARY, (ROWS, LENGTH), generator=generator)
    lengths = LENGTH - torch.arange(ROWS).unsqueeze(1)
    mask = (torch.arange(LENGTH) < lengths).long()
    is_target = (torch.arange(LENGTH) >= 3) & (torch.arange(LENGTH) < lengths - 1)
    targets = torch.where(is_target, ids.roll(-1, 1), torch.tensor(-100))
    return {"input_ids": ids * mask, "attention_mask": mask, "shift_labels": targets}


def capped(make_model):
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "final_logit_softcapping": 0.5}
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=VOCABULARY, initializer_range=0.5, **sizes, **heads))


def with_adapter(make_model):
    from peft import LoraConfig, get_peft_model

    model = make_model(seed=1, vocab_size=VOCABULARY, logit_scale=0.3)
    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False))


def without_a_whole_trunk(make_model):
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "init_std": 0.5}
    return OPTForCausalLM(OPTConfig(vocab_size=VOCABULARY, word_embed_proj_dim=32, **sizes))


@pytest.mark.slow
@pytest.mark.parametrize("make_teacher", [capped, with_adapter, without_a_whole_trunk])
def test_the_figures_are_their_definitions_and_made_in_chunks(make_teacher, make_model, batch, monkeypatch):
    monkeypatch.setattr(before_after, "CHUNK", CHUNK)
    teacher, student = make_teacher(make_model).train(), make_model(vocab_size=VOCABULARY)
    with Largest() as seen:
        metrics = fit_metrics([batch, batch], {"teacher": teacher, "student": student})
    assert teacher.training and not student.training
    chosen, kept = {}, batch["shift_labels"] != -100
    for name, model in (("teacher", teacher.eval()), ("student", student)):
        with torch.no_grad():
            read = {key: batch[key] for key in ("input_ids", "attention_mask")}
            logits = model(**read, use_cache=False).logits[kept]
        surprise = torch.nn.functional.cross_entropy(logits, batch["shift_labels"][kept])
        assert metrics[f"perplexity_{name}"] == pytest.approx(surprise.exp().item(), rel=1e-5)
        chosen[name] = logits.argmax(-1)
    agreed = (chosen["teacher"] == chosen["student"]).float()
    assert metrics["agreement_student"] == pytest.approx(agreed.mean().item())
    # Both batches are the same rows: the error of twelve rows where a half are copies.
    counts, row_of = kept.sum(1).double(), kept.nonzero()[:, 0]
    rows = torch.zeros(ROWS, dtype=torch.double).index_add_(0, row_of, agreed.double())
    spread = 2 * (rows - agreed.mean() * counts).square().sum() * 12 / 11
    assert metrics["agreement_student_se"] == pytest.approx((spread.sqrt() / (2 * counts.sum())).item(), rel=1e-4)
    assert metrics["perplexity_teacher_n"] == 2 * int((counts > 0).sum()) == 2 * ROWS
    if make_teacher is not without_a_whole_trunk:
        # The first place of each row comes with the states.
        assert seen.rows == max(CHUNK, ROWS) < kept.sum()


def judged(means, spread):
    """Answers to ten prompts, two samples each, whose gold rewards lie `spread` around these means."""

    def answers(golds):
        return [{"family": "fact", "is_new_phrasing": False, "prompt": "p", "response": "r", "gold": g} for g in golds]

    return before_after.GoldEvaluation(
        sampled=answers([mean + side * spread for mean in means for side in (-1, 1)]),
        greedy=answers(means),
        facts=answers([1.0, 0.0, 1.0]),
    )


def test_errors_of_gold_rewards_are_over_prompts_and_differences_are_paired():
    prompts = [place / 10 for place in range(10)]
    models = {
        "teacher": judged([mean + 0.2 + 0.01 * (place % 2) for place, mean in enumerate(prompts)], 0.3),
        "student": judged(prompts, 0.3),
        "student_alone": judged([mean + 0.1 * (-1) ** place for place, mean in enumerate(prompts)], 0.3),
    }
    metrics = before_after.gold_metrics(models)
    # The samples of a prompt differ, but their mean is the prompt's: twenty answers are ten values.
    error = torch.tensor(prompts).std() / 10**0.5
    assert metrics["gold_reward_student_se"] == pytest.approx(error.item()) and metrics["gold_reward_student_n"] == 10
    assert metrics["gold_reward_greedy_student_se"] == pytest.approx(error.item())
    assert metrics["fact_accuracy_student"] == pytest.approx(2 / 3) and metrics["fact_accuracy_student_n"] == 3
    assert metrics["gold_reward_kept"] == pytest.approx(0.45 / 0.655)
    said = before_after.distillation_summary(metrics, models)
    assert said.startswith(
        "Gold reward on 10 held-out prompts: teacher 0.655 ± 0.096, student 0.450 ± 0.096, student "
    )
    # The means are two errors apart, the pairs 120.
    assert "The student is worse than its teacher by 0.2050 ± 0.0017." in said
    assert "No difference beyond noise between the student and the same student without a teacher." in said
    assert before_after.distillation_summary(metrics, {}) == ""
