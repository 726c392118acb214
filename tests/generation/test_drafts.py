"""Drafts: what they propose, what they share with the target, and which are refused."""

import pytest
import torch
import transformers

from hfllm.errors import InputError
from hfllm.generation.packed.ragged_model import RaggedModel, early_exit, padded_right
from hfllm.generation.speculative.acceptance import check_same_vocabulary
from hfllm.generation.speculative.drafts import EarlyExitDraft, ModelDraft, PromptLookupDraft, Rows, weights_read
from hfllm.generation.speculative.speculative import speculative_generate


def rows_of(*sequences, capacity=32):
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    tokens = torch.zeros(len(sequences), capacity, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.tensor(sequence)
    return Rows(tokens, lengths, lengths + 10, lengths.tolist())


def lookup(*sequences, steps=4, **settings):
    draft = PromptLookupDraft(**settings)
    rows = rows_of(*sequences)
    draft.begin(None, rows, False)
    proposal = draft.propose(rows, steps, None)
    return [row[:count] for row, count in zip(proposal.tokens.tolist(), proposal.counts.tolist(), strict=True)]


def test_prompt_lookup_copies_what_followed():
    assert lookup([1, 2, 3, 4, 5, 9, 1, 2, 3]) == [[4, 5, 9, 1]]
    assert lookup([1, 2, 3, 4]) == [[]]
    # The longest n-gram wins over a later, shorter one; among equals the latest.
    assert lookup([1, 2, 7, 7, 8, 2, 9, 9, 1, 2]) == [[7, 7, 8, 2]]
    assert lookup([2, 7, 6, 2, 8, 5, 2]) == [[8, 5, 2, 8]]
    # A loop is followed beyond the row's end.
    assert lookup([5, 1, 2, 1, 2], steps=7) == [[1, 2, 1, 2, 1, 2, 1]]
    assert lookup([1, 2, 3, 9, 2, 3], min_ngram=3) == [[]]
    assert lookup([6, 6], [1, 2, 3], [4, 5, 4], steps=2) == [[6, 6], [], [5, 4]]


def test_prompt_lookup_goes_on_as_rows_grow_and_leave():
    draft = PromptLookupDraft()
    draft.begin(None, rows_of([0], [0], [0]), False)
    draft.propose(rows_of([1, 2, 3], [4, 5], [6, 7, 6]), 2, None)
    draft.keep(torch.tensor([0, 2]))
    proposal = draft.propose(rows_of([1, 2, 3, 1, 2], [6, 7, 6, 7]), 3, None)
    assert proposal.tokens.tolist() == [[3, 1, 2], [6, 7, 6]]


def test_early_exit_is_the_model_of_the_first_layers(make_target):
    target = make_target()
    shortened = early_exit(target, 2)
    small = make_target(num_hidden_layers=2)
    small.load_state_dict(target.state_dict(), strict=False)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(shortened(ids).logits, small(ids).logits)
        assert not torch.equal(shortened(ids).logits, target(ids).logits)
    assert len(target.model.layers) == 4
    assert {parameter.data_ptr() for parameter in shortened.parameters()} <= {
        parameter.data_ptr() for parameter in target.parameters()
    }


def test_early_exit_ignores_a_forward_that_was_put_on_the_instance(make_target):
    target = make_target()
    target.forward = target.forward
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert not torch.equal(early_exit(target, 1)(ids).logits, target(ids).logits)


def test_a_perfect_draft_is_never_wrong(make_target, prompts):
    """The draft's cache keeps up when whole drafts are accepted, whose last token it has not read."""
    target = make_target()
    options = {"max_new_tokens": 24, "num_draft_tokens": 4}
    seen = speculative_generate(target, ModelDraft(target), *prompts(5), **options).statistics
    assert seen.acceptance_rate == 1
    sampled = {**options, "do_sample": True, "generator": torch.Generator().manual_seed(0)}
    assert speculative_generate(target, target, *prompts(5), **sampled).statistics.acceptance_rate > 0.999


@pytest.mark.parametrize("kind", ["model", "early exit"])
def test_a_draft_remembers_what_was_accepted_and_nothing_else(kind, make_target, blurred, prompts):
    """It proposes what it would if it read each row anew."""

    class Anew(ModelDraft):
        def begin(self, target, rows, compiled):
            self.target = target
            super().begin(target, rows, compiled)

        def propose(self, rows, steps, sampler):
            self.begin(self.target, rows, False)
            return super().propose(rows, steps, sampler)

    target = make_target()
    model = blurred(target) if kind == "model" else early_exit(target, 3)
    draft = ModelDraft(model) if kind == "model" else EarlyExitDraft(3)
    options = {"max_new_tokens": 24, "num_draft_tokens": 4}
    remembered, anew = (speculative_generate(target, each, *prompts(5), **options) for each in (draft, Anew(model)))
    assert remembered.statistics == anew.statistics
    assert 0 < anew.statistics.acceptance_rate < 1


def test_rolling_back_leaves_no_trace(make_target, prompts):
    """Logits after wrong tokens were written behind a row's end, against a run that never saw them."""
    model = make_target()
    ids, mask = prompts(3)
    tokens, lengths = padded_right(ids, mask, 24), mask.sum(1)
    last = lengths + 10

    def logits(spoil):
        runner = RaggedModel(model, 24)
        runner.prefill(tokens[:, : int(lengths.max())], lengths, last, lengths.tolist())
        columns = lengths.unsqueeze(1) - 1 + torch.arange(3)
        if spoil:
            runner(torch.full_like(columns, 9), columns, last, int(lengths.max()) + 2)
        end = tokens.gather(1, lengths.unsqueeze(1) - 1)
        return runner(end, columns[:, :1], last, int(lengths.max()))[:, -1]

    with torch.no_grad():
        alone = torch.stack([model(ids[row : row + 1, mask[row] == 1]).logits[0, -1] for row in range(3)])
        assert torch.equal(logits(True), logits(False))
        assert torch.allclose(logits(True), alone)


def test_cost_ratios_count_the_weights_that_a_token_passes(make_target):
    target = make_target()
    small = make_target(num_hidden_layers=1)
    body = sum(parameter.numel() for parameter in target.model.layers[0].parameters())
    others = 32 + 40 * 32  # final norm and head
    assert weights_read(target) == 4 * body + others
    assert ModelDraft(small).cost_ratio(target) == pytest.approx((body + others) / (4 * body + others))
    assert EarlyExitDraft(1).cost_ratio(target) == ModelDraft(small).cost_ratio(target)
    assert EarlyExitDraft().cost_ratio(target) == EarlyExitDraft(2).cost_ratio(target)
    assert PromptLookupDraft().cost_ratio(target) == 0
    tied = make_target(tie_word_embeddings=True)
    assert weights_read(tied) == weights_read(target)


def test_a_draft_with_another_vocabulary_is_refused(make_target, prompts):
    target, other = make_target(), make_target(vocab_size=41)
    with pytest.raises(InputError, match=r"vocab_size=41, the target 40: use prompt lookup or early exit"):
        speculative_generate(target, other, *prompts(1), max_new_tokens=3)


def test_a_draft_with_another_tokenizer_is_refused(make_target, tokenizer):
    from hfllm.data.tokenizer import train_tokenizer

    target, other = make_target(), make_target(seed=1)
    check_same_vocabulary(target, other, tokenizer, tokenizer)
    second = train_tokenizer(["zebra quagga okapi " * 20], vocab_size=300, model_max_length=64)
    with pytest.raises(InputError, match=r"another tokenizer: token '.+' is number .+ there, .+ in the target's"):
        check_same_vocabulary(target, other, tokenizer, second)


def test_a_draft_with_fewer_positions_than_the_text_takes_is_refused(make_target, prompts):
    shorter = make_target(position_embedding_type="learned", max_position_embeddings=12)
    settings = {"position_embedding_type": "learned"}
    with pytest.raises(InputError, match="make 13 tokens, but the draft model, a hfllm, has positions for 12"):
        speculative_generate(make_target(**settings), shorter, *prompts(1), max_new_tokens=4)
    speculative_generate(make_target(**settings), shorter, *prompts(1), max_new_tokens=3)


def test_models_without_positions_to_go_back_to_are_refused(make_target, prompts):
    sizes = {"vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    bart = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **heads))
    with pytest.raises(InputError, match=r"the model \(bart\) is an encoder-decoder"):
        speculative_generate(bart, None, *prompts(1), max_new_tokens=3)
    with pytest.raises(InputError, match=r"the draft model \(bart\) is an encoder-decoder"):
        ModelDraft(bart)
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(InputError, match=r"the model \(mamba\) does not take positions and a key-value cache"):
        speculative_generate(mamba, None, *prompts(1), max_new_tokens=3)
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(InputError, match="bloom"):
        speculative_generate(bloom, None, *prompts(1), max_new_tokens=3)
    target = make_target()
    target.config._attn_implementation = "flex_attention"
    with pytest.raises(InputError, match=r"attn_implementation='flex_attention'.*'sdpa'"):
        speculative_generate(target, None, *prompts(1), max_new_tokens=3)


def test_an_adapter_counts_when_the_base_model_is_passed(make_target, blurred, prompts):
    from peft import LoraConfig, get_peft_model

    ids, mask = prompts(2)
    plain = make_target().generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(make_target(), settings).double().eval()
    with pytest.raises(InputError, match=r"wrapped by PEFT: pass model\.get_base_model\(\)"):
        speculative_generate(model, None, ids, mask, max_new_tokens=8)
    wanted = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    found = speculative_generate(model.get_base_model(), EarlyExitDraft(2), ids, mask, max_new_tokens=8).sequences
    assert found.tolist() == wanted.tolist() != plain.tolist()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PromptLookupDraft(2, 3), "n-grams of 3 to 2 tokens"),
        (lambda: PromptLookupDraft(2, 0), "n-grams of 0 to 2 tokens"),
    ],
)
def test_nonsense_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("layers", [4, 5, 0, -1])
def test_early_exit_needs_fewer_layers_than_the_model_has(layers, make_target, prompts):
    with pytest.raises(InputError, match=rf"early exit after {layers} layer\(s\): expected 1 to 3"):
        speculative_generate(make_target(), EarlyExitDraft(layers), *prompts(1), max_new_tokens=3)
