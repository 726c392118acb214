"""Routers, shared experts and layers without any, against loops over single tokens; refusals; and one graph."""

import itertools

import pytest
import torch
from families import FAMILIES
from huggingface_hub.errors import StrictDataclassError

import hfllm
from hfllm.models.family.experts_hfllm import HfllmRouter, HfllmSparseMLP

DEEPSEEK = FAMILIES["glm4-moe"]


def chosen_by_hand(scores, bias, config):
    """The experts of one token, lowest first, and their weights: the papers' formulas in plain Python."""
    size = config.num_local_experts // config.n_group
    choice = [score + shift for score, shift in zip(scores, bias, strict=True)]
    groups = [choice[start : start + size] for start in range(0, len(choice), size)]
    if config.topk_method == "noaux_tc":
        values = [sum(sorted(group)[-2:]) if len(group) > 1 else group[0] for group in groups]
    else:
        values = [max(group) for group in groups]
    best = sorted(range(len(groups)), key=lambda group: -values[group])[: config.topk_group]
    allowed = [expert for expert in range(len(scores)) if expert // size in best]
    experts = sorted(sorted(allowed, key=lambda expert: -choice[expert])[: config.num_experts_per_tok])
    total = sum(scores[expert] for expert in experts) if config.norm_topk_prob else 1.0
    return experts, [config.routed_scaling_factor * scores[expert] / total for expert in experts]


@pytest.mark.parametrize(
    ("scoring_func", "topk_method", "norm_topk_prob"),
    itertools.product(("softmax", "sigmoid"), ("greedy", "group_limited_greedy", "noaux_tc"), (True, False)),
)
def test_a_router_chooses_as_the_papers_say(make_config, scoring_func, topk_method, norm_topk_prob):
    groups = {"n_group": 1, "topk_group": 1} if topk_method == "greedy" else {"n_group": 4, "topk_group": 2}
    axes = {"scoring_func": scoring_func, "topk_method": topk_method, "norm_topk_prob": norm_topk_prob}
    config = make_config(num_local_experts=12, num_experts_per_tok=4, routed_scaling_factor=2.5, **axes, **groups)
    router, bias = HfllmRouter(config).eval(), torch.zeros(12)
    torch.manual_seed(0)
    torch.nn.init.normal_(router.weight)
    if topk_method == "noaux_tc":
        bias = router.e_score_correction_bias.copy_(torch.randn(12))
    tokens = torch.randn(50, 32)
    with torch.no_grad():
        _, weights, indices = router(tokens)
    logits = tokens @ router.weight.T
    scores = logits.sigmoid() if scoring_func == "sigmoid" else logits.softmax(-1)
    for each in range(50):
        experts, expected = chosen_by_hand(scores[each].tolist(), bias.tolist(), config)
        order = indices[each].argsort()
        assert indices[each][order].tolist() == experts
        torch.testing.assert_close(weights[each][order], torch.tensor(expected), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("gated", [True, False])
def test_all_tokens_pass_the_shared_experts(make_config, gated):
    config = make_config(**{**DEEPSEEK, "n_shared_experts": 2, "shared_expert_gate": gated})
    mlp = HfllmSparseMLP(config).eval()
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    states = torch.randn(2, 5, 32)
    tokens = states.reshape(-1, 32)
    _, weights, indices = mlp.gate(tokens)
    expected = torch.zeros_like(tokens)
    for row, (token, experts, shares) in enumerate(zip(tokens, indices, weights, strict=True)):
        for expert, share in zip(experts, shares, strict=True):
            gate, up = (mlp.experts.gate_up_proj[expert] @ token).chunk(2)
            expected[row] += share * (mlp.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up))
        shared = mlp.shared_experts
        assert shared.up_proj.weight.shape == (2 * 32, 32)
        inner = torch.nn.functional.silu(shared.gate_proj.weight @ token) * (shared.up_proj.weight @ token)
        factor = torch.sigmoid(mlp.shared_expert_gate.weight[0] @ token) if gated else 1.0
        expected[row] += factor * (shared.down_proj.weight @ inner)
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        config._experts_implementation = implementation
        torch.testing.assert_close(mlp(states).reshape(-1, 32), expected, atol=1e-5, rtol=1e-5)


def test_the_loss_of_the_load_is_that_of_shares_of_sigmoid_scores(make_model, ids):
    model = make_model(**{**DEEPSEEK, "router_aux_loss_coef": 0.5, "n_group": 1, "topk_group": 1}).eval()
    output = model(ids, output_router_logits=True)
    assert len(output.router_logits) == 1
    scores = output.router_logits[0].sigmoid()
    shares, experts = scores / scores.sum(-1, keepdim=True), scores.topk(2).indices
    loads = torch.nn.functional.one_hot(experts, 8).sum((0, 1)) / len(scores)
    torch.testing.assert_close(output.aux_loss, 8 * (loads * shares.mean(0)).sum())


@pytest.fixture
def ids():
    return torch.randint(10, 300, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("implementation", "coefficient"),
    [("eager", 0.01), ("grouped_mm", 0.0)],
)
@pytest.mark.slow
@pytest.mark.turn(2)
def test_training_is_one_graph(make_model, ids, implementation, coefficient):
    """With every implementation of experts, the loss of the load and a bias that follows it."""
    model, same = (make_model(**DEEPSEEK, router_aux_loss_coef=coefficient).train() for _ in range(2))
    model.set_experts_implementation(implementation)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        losses = [each(input_ids=ids, labels=ids, use_cache=False).loss for each in (compiled, same)]
        for loss in losses:
            loss.backward()
    torch.testing.assert_close(*losses)
    gradients = [[parameter.grad for parameter in each.parameters()] for each in (model, same)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
    loads = [each.model.layers[1].mlp.gate.load for each in (model, same)]
    assert loads[0].sum() == 2 * ids.numel() * 2 and torch.equal(*loads)


def test_routers_that_compute_in_fp32_stay_there(make_model, tmp_path):
    model = make_model(**DEEPSEEK)
    model.model.layers[1].mlp.gate.e_score_correction_bias.normal_()
    model.save_pretrained(tmp_path)
    loaded = hfllm.HfllmForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    router = loaded.model.layers[1].mlp.gate
    assert (loaded.dtype, router.weight.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(router.e_score_correction_bias, model.model.layers[1].mlp.gate.e_score_correction_bias)
    # Rounded to bf16, steps of 0.001 would be lost.
    assert model.to(torch.bfloat16).model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32


@pytest.mark.parametrize("axes", [DEEPSEEK, {"num_local_experts": 4}], ids=["sigmoid", "plain"])
def test_a_new_model_in_half_precision_has_the_routers_of_a_loaded_one(make_config, tmp_path, axes):
    model = hfllm.HfllmForCausalLM._from_config(make_config(**axes), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = hfllm.HfllmForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kinds, others = ({name: each.dtype for name, each in of.state_dict().items()} for of in (model, loaded))
    assert kinds == others and model.dtype == torch.bfloat16
    assert kinds["model.layers.1.mlp.gate.weight"] == (torch.float32 if axes is DEEPSEEK else torch.bfloat16)


def test_other_names_of_the_same(make_config):
    config = make_config(n_routed_experts=8, first_k_dense_replace=1, topk_method="noaux_tc")
    assert config.num_local_experts == config.num_experts == 8
    assert config.mlp_layer_types == ["dense", "sparse"]
    assert (config.router_aux_loss_coef, config.router_bias_update_rate) == (0.0, 0.001)
    assert make_config(num_experts=4).router_aux_loss_coef == 0.001
    every = make_config(num_local_experts=4, mlp_layer_types=["sparse", "sparse"])
    assert every.mlp_layer_types is None


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"scoring_func": "softplus"}, "scoring_func='softplus' is not one of softmax, sigmoid"),
        ({"topk_method": "random"}, "topk_method='random' is not one of greedy, group_limited_greedy, noaux_tc"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 must lie between 1 and num_local_experts=8"),
        ({"n_group": 3}, "n_group=3 must divide num_local_experts=8"),
        ({"n_group": 0}, "n_group=0 must divide"),
        ({"topk_group": 5}, "topk_group=5 must lie between 1 and n_group=4"),
        (
            {"num_experts_per_tok": 5},
            "num_experts_per_tok=5 is more than the 4 experts in topk_group=2 groups of 2",
        ),
        ({"n_group": 8}, "n_group=8 must leave two of num_local_experts=8 in each group"),
        (
            {"topk_method": "greedy"},
            "n_group=4 needs topk_method='group_limited_greedy' or 'noaux_tc', got 'greedy'",
        ),
        ({"mlp_layer_types": ["dense", "spars"]}, "'spars' is not one of dense, sparse; did you mean 'sparse'?"),
        ({"mlp_layer_types": ["sparse"]}, "mlp_layer_types names 1 layers, and num_hidden_layers=2"),
        ({"mlp_layer_types": ["dense", "dense"]}, "num_local_experts=8 needs a 'sparse' in mlp_layer_types"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size must be at least 1 or None, got 0"),
        ({"n_shared_experts": -1}, "n_shared_experts must not be negative, got -1"),
        (
            {"shared_expert_intermediate_size": 8},
            "n_shared_experts=1 and shared_expert_intermediate_size=8 both give the shared MLP its width",
        ),
        ({"n_shared_experts": 0, "shared_expert_gate": True}, "shared_expert_gate=True needs n_shared_experts or"),
        ({"routed_scaling_factor": 0.0}, "routed_scaling_factor must be above 0, got 0.0"),
        ({"router_bias_update_rate": -1.0}, "router_bias_update_rate must not be negative, got -1.0"),
        (
            {"topk_method": "group_limited_greedy", "router_bias_update_rate": 0.1},
            "router_bias_update_rate=0.1 needs topk_method='noaux_tc', got 'group_limited_greedy'",
        ),
    ],
)
def test_bad_fields_are_refused_in_one_line(make_config, axes, message):
    with pytest.raises(StrictDataclassError) as error:
        make_config(**{**DEEPSEEK, **axes})
    assert message in str(error.value) and len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize(
    "axes", [{"n_shared_experts": 1}, {"scoring_func": "sigmoid"}, {"mlp_layer_types": ["sparse", "dense"]}]
)
def test_fields_of_experts_without_experts_are_refused(make_config, axes):
    with pytest.raises(StrictDataclassError, match="needs num_local_experts of at least 1, got 0"):
        make_config(**axes)
