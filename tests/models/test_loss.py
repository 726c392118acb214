"""The chunked loss is the plain loss, in value and gradient, and the experts' balance is Mixtral's."""

import pytest
import torch
from families import FAMILIES
from torch.utils.flop_counter import FlopCounterMode

from hfllm.models.family.modeling_hfllm import linear_cross_entropy


@pytest.fixture
def batch():
    ids = torch.randint(10, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :5] = -100
    labels[1, 7] = -100
    return {"input_ids": ids, "labels": labels}


def loss_and_gradients(model, **inputs):
    model.train()
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


CASES = [
    {},
    {"num_items_in_batch": 7},
    {"num_items_in_batch": torch.tensor(7)},
    {"label_smoothing": 0.1},
    {"label_smoothing": 0.1, "num_items_in_batch": 7},
    {"ignore_index": 42},
]


@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "cohere", "mixtral"])
def test_chunked_equals_plain(make_model, batch, family, case, chunk):
    model = make_model(**FAMILIES[family])
    if "ignore_index" in case:
        batch["labels"] = batch["labels"].where(batch["labels"] != -100, case["ignore_index"])
    plain, expected = loss_and_gradients(model, **batch, **case)
    chunked, gradients = loss_and_gradients(model, **batch, **case, loss_chunk_size=chunk)
    assert chunked.logits is None
    torch.testing.assert_close(chunked.loss, plain.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-5)


def test_a_label_outside_the_vocabulary_is_an_error(make_model, batch):
    """-100 is not ignored where another label is, as in the plain loss."""
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        make_model()(**batch, ignore_index=42, loss_chunk_size=5)


def test_label_smoothing_is_transformers(make_model, batch):
    from transformers.trainer_pt_utils import LabelSmoother

    model = make_model()
    output = model(**batch, label_smoothing=0.2)
    expected = LabelSmoother(epsilon=0.2)({"logits": output.logits}, batch["labels"], shift_labels=True)
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("chunk", [3, 64])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_smoothed_gradients_are_torchs(chunk, softcap):
    """A model's own loss takes this path whenever it smooths: chunked against plain would compare it with itself."""
    hidden = torch.randn(11, 8, generator=torch.Generator().manual_seed(0))
    head, targets = torch.nn.Linear(8, 20, bias=False), torch.arange(11) * 2 - 1
    targets[[0, 7]] = -100

    def gradients(loss_of):
        states = hidden.clone().requires_grad_()
        head.zero_grad()
        loss_of(states).backward()
        return states.grad, head.weight.grad.clone()

    def expected(states):
        scores = head(states) if softcap is None else softcap * torch.tanh(head(states) / softcap)
        return torch.nn.functional.cross_entropy(scores, targets, reduction="sum", label_smoothing=0.3)

    ours = gradients(lambda states: linear_cross_entropy(states, head, targets, chunk, 0.3, softcap=softcap))
    torch.testing.assert_close(ours, gradients(expected))


def test_shifted_labels_pass(make_model, batch):
    model = make_model()
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    inputs = {"input_ids": batch["input_ids"], "labels": batch["labels"], "shift_labels": shifted}
    expected = model(**batch).loss
    torch.testing.assert_close(model(**inputs).loss, expected)
    torch.testing.assert_close(model(**inputs, loss_chunk_size=4).loss, expected)


def test_the_config_asks_for_chunks_and_without_labels_there_are_logits(make_model, batch):
    model, chunked = make_model(), make_model(loss_chunk_size=4)
    torch.testing.assert_close(chunked(**batch).loss, model(**batch).loss)
    assert chunked(**batch).logits is None
    assert torch.equal(chunked(batch["input_ids"]).logits, model(batch["input_ids"]).logits)


@pytest.mark.parametrize("chunk", [4, None])
def test_evaluation_gives_logits_to_who_computes_metrics(make_model, tmp_path, chunk):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in torch.randint(10, 300, (3, 8)).tolist()]
    model, seen = make_model(loss_chunk_size=chunk), []
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", per_device_eval_batch_size=2)
    report = Trainer(
        model, arguments, eval_dataset=rows, compute_metrics=lambda each: seen.append(each) or {}
    ).evaluate()
    logits = torch.from_numpy(seen[0].predictions)
    ids = torch.tensor([row["input_ids"] for row in rows])
    torch.testing.assert_close(logits, make_model()(ids).logits.detach())
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert report["eval_loss"] == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("is_asked", [True, False])
def test_a_batch_that_asks_for_chunks_is_evaluated_without_logits(make_model, tmp_path, is_asked):
    """Also where the config asks too, which by itself makes those of the whole batch."""
    from transformers import DefaultDataCollator, Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in torch.randint(10, 300, (3, 8)).tolist()]
    model, collate, widths, losses = make_model(loss_chunk_size=4), DefaultDataCollator(), [], []
    model.lm_head.register_forward_hook(lambda module, args, output: widths.append(output.shape[:-1].numel()))
    for settings in ({"loss_chunk_size": 4} if is_asked else {}, {"loss_chunk_size": 0}):
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", prediction_loss_only=True)
        collator = lambda rows, settings=settings: {**collate(rows), **settings}  # noqa: E731
        losses.append(Trainer(model, arguments, data_collator=collator, eval_dataset=rows).evaluate()["eval_loss"])
        if len(losses) == 1:
            assert max(widths) == (4 if is_asked else 24)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("nothing", [0, None])
def test_no_chunks_are_said_alike_by_config_and_call(make_model, batch, nothing):
    assert make_model(loss_chunk_size=nothing)(**batch).logits is not None
    assert make_model()(**batch, loss_chunk_size=nothing).logits is not None


def test_a_negative_chunk_is_refused_by_config_and_call(make_model, batch):
    with pytest.raises(ValueError, match="loss_chunk_size must be at least 0 or None, got -4"):
        make_model()(**batch, loss_chunk_size=-4)
    with pytest.raises(Exception, match="loss_chunk_size must be at least 0 or None, got -4"):
        make_model(loss_chunk_size=-4)


def test_a_head_with_an_adapter_is_called_as_a_module(make_model, batch):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(make_model(), LoraConfig(target_modules=["lm_head", "q_proj"], init_lora_weights=False))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    results = []
    for chunk in (None, 5):
        model.zero_grad()
        loss = model(**batch, loss_chunk_size=chunk).loss
        loss.backward()
        results.append((loss.detach(), {name: model.get_parameter(name).grad.clone() for name in trained}))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)
    assert any("lm_head" in name for name in trained)


@pytest.mark.parametrize("precision", ["autocast", "weights"])
def test_chunked_in_bf16_is_close_to_plain(make_model, batch, precision):
    model = make_model()
    if precision == "weights":
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        plain, expected = loss_and_gradients(model, **batch)
        chunked, gradients = loss_and_gradients(model, **batch, loss_chunk_size=5)
    torch.testing.assert_close(chunked.loss.float(), plain.loss.float(), atol=2e-2, rtol=1e-2)
    for name, gradient in gradients.items():
        assert gradient.dtype == expected[name].dtype
        assert (gradient - expected[name]).norm() < 0.05 * expected[name].norm() + 1e-6, name


def test_the_head_alone_can_be_trained(make_model, batch):
    model = make_model()
    model.model.requires_grad_(False)
    gradients = []
    for chunk in (None, 5):
        model.zero_grad()
        model(**batch, loss_chunk_size=chunk).loss.backward()
        gradients.append(model.lm_head.weight.grad.clone())
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


def test_it_is_differentiated_once_and_can_be_switched_off(make_model, batch):
    model = make_model(loss_chunk_size=4)
    loss = model(**batch).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()
    assert model(**batch, loss_chunk_size=0).logits is not None


def test_a_frozen_head_gets_no_gradient(make_model, batch):
    model = make_model()
    model.lm_head.requires_grad_(False)
    _, expected = loss_and_gradients_of_trained(model, **batch)
    _, gradients = loss_and_gradients_of_trained(model, **batch, loss_chunk_size=4)
    torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-5)


def test_without_a_gradient_no_more_is_computed_than_logits(make_model, batch):
    model, counted = make_model(), []
    for chunk in (0, 4):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**batch, loss_chunk_size=chunk)
        counted.append(counter.get_total_flops())
    # Chunks leave out the last token of each row, which has no target.
    assert 0 < counted[1] <= counted[0]


def loss_and_gradients_of_trained(model, **inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss, [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]


def test_balance_does_not_count_padding(make_model, batch):
    model = make_model(**FAMILIES["mixtral"], output_router_logits=True)
    expected = model(batch["input_ids"]).aux_loss
    padded = torch.cat((torch.zeros(2, 5, dtype=torch.long), batch["input_ids"]), 1)
    mask = (torch.arange(17) >= 5).long().expand(2, -1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = model(padded, attention_mask=mask, position_ids=positions).aux_loss
    torch.testing.assert_close(got, expected)


def test_evenly_used_experts_cost_the_number_of_experts_a_token(make_model, batch):
    """Switch Transformer's loss with top-k, as Mixtral has it: N * sum of (k / N) * (1 / N) over N experts is k."""
    model = make_model(**FAMILIES["mixtral"], output_router_logits=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.zero_()
    assert model(**batch).aux_loss.item() == pytest.approx(model.config.num_experts_per_tok, rel=1e-6)


def test_training_balances_the_experts_and_evaluation_is_the_language_model_alone(make_model, batch):
    model = make_model(**FAMILIES["mixtral"], router_aux_loss_coef=0.5)
    evaluated = model(**batch)
    assert evaluated.aux_loss is None
    trained = model.train()(**batch)
    torch.testing.assert_close(trained.loss, evaluated.loss + 0.5 * trained.aux_loss)
    asked = model.eval()(**batch, output_router_logits=True)
    assert len(asked.router_logits) == model.config.num_hidden_layers
    torch.testing.assert_close(asked.loss, trained.loss)
