"""One base model in memory for policy, critic, reference and reward models, each by an adapter of its own.

The trunk of a critic or of a reward model is the policy's own module, which computes under another adapter for one
pass. The reference is the base without an adapter, or under the one that the policy began with (`as_reference`).
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from hfllm.errors import InputError, one_line, refuse_if
from hfllm.models.loading.adapters import HEADS, WEIGHT_FILES, SavedAdapter, find_adapter
from hfllm.models.loading.saved import reads_pictures, trusts_remote_code
from hfllm.rewards.models import RewardModel
from hfllm.trainers.engines import evaluation_mode

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedTokenizerBase

# Names of adapters in the policy.
CRITIC, REWARD = "critic", "reward"


# ---- adapters that take turns ----


@contextmanager
def trained_as_before(model: nn.Module) -> Iterator[None]:
    """Train the same weights afterwards: PEFT freezes the other adapters whenever one is made the active one."""
    flags = [(each, each.requires_grad) for each in model.parameters()]
    try:
        yield
    finally:
        for parameter, is_trained in flags:
            if parameter.requires_grad != is_trained:
                parameter.requires_grad_(is_trained)


@contextmanager
def active(policy: "PeftModel", adapter: str) -> Iterator[None]:
    """Compute under another of the policy's adapters within this context."""
    own = policy.active_adapter
    if own == adapter:
        yield
        return
    _activate(policy, adapter)
    try:
        yield
    finally:
        _activate(policy, own)


def _activate(policy: "PeftModel", adapter: str) -> None:
    with trained_as_before(policy):
        policy.set_adapter(adapter)


# ---- models of scores on the policy's trunk ----


class AdapterScorer(nn.Module):
    """A model for scores whose trunk is the policy's under another adapter. The head is its only part.

    So to freeze, move or save it leaves the policy as it is.

    Args:
        policy: with the adapter.
        adapter: its name in the policy.
        head: the weights of the head, such as `{"weight": (1, E)}`; zeros by default, as of a new value head.
        name: where the adapter was saved, for messages.
    """

    base_model_prefix = "trunk"

    def __init__(
        self, policy: "PeftModel", adapter: str, head: dict[str, torch.Tensor] | None = None, name: str = CRITIC
    ):
        super().__init__()
        base = policy.get_base_model()
        self.adapter, self.config = adapter, copy.deepcopy(base.config)
        self.config.num_labels, self.config._name_or_path = 1, name
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(self.config, trust_remote_code=trusts_remote_code())
        setattr(model, model.base_model_prefix, getattr(base, base.base_model_prefix))
        at = next(each for each in HEADS if isinstance(getattr(model, each, None), nn.Module))
        self.score = getattr(model, at).to_empty(device=base.device).to(torch.float32)
        with torch.no_grad():
            for parameter in self.score.parameters():
                parameter.zero_()
        if head is not None:
            self.score.load_state_dict(head)
        setattr(model, at, self.score)
        # A tuple holds no submodules.
        self._shared = (policy, model)

    @property
    def trunk(self) -> PreTrainedModel:
        """The policy's trunk."""
        model = self._shared[1]
        return getattr(model, model.base_model_prefix)

    @property
    def device(self) -> torch.device:
        """Where the trunk is."""
        return self.trunk.device

    @property
    def dtype(self) -> torch.dtype:
        """The trunk's precision."""
        return self.trunk.dtype

    def get_input_embeddings(self) -> nn.Module:
        """Return the trunk's."""
        return self.trunk.get_input_embeddings()

    def active(self) -> AbstractContextManager[None]:
        """Return a context in which the trunk is under this model's adapter."""
        return active(self._shared[0], self.adapter)

    def recomputed(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the contexts of a checkpoint's passes: the second is under the adapter that the first was under."""
        policy = self._shared[0]
        return nullcontext(), active(policy, policy.active_adapter)

    def own_parameters(self) -> list[nn.Parameter]:
        """Return the weights of head and adapter."""
        adapted = self._shared[0].named_parameters()
        return [*self.score.parameters(), *(each for name, each in adapted if self.adapter in name.split("."))]

    def forward(self, **inputs: torch.Tensor) -> object:
        """Return the scores of sequences, as a model for sequence classification does."""
        model = self._shared[1]
        with self.active(), evaluation_mode(model):
            return model(**inputs)

    def save(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        """Write adapter and head as an adapter for sequence classification, as `hfllm reward --use_peft` does.

        Args:
            state: the state dict of an `ActorCritic` with this critic.
        """
        from peft import get_peft_model_state_dict

        policy = self._shared[0]
        own = {name.removeprefix("policy."): value for name, value in state.items() if name.startswith("policy.")}
        weights = get_peft_model_state_dict(policy, own, adapter_name=self.adapter, save_embedding_layers=False)
        head = {name: state[f"value_model.score.{name}"] for name in self.score.state_dict()}
        weights |= {f"base_model.model.score.{name}": value for name, value in head.items()}
        config = replace(policy.peft_config[self.adapter], task_type="SEQ_CLS", inference_mode=True)
        config.modules_to_save = ["score"]
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in weights.items()}, folder / WEIGHT_FILES[0])
        config.save_pretrained(str(folder))

    def load(self, folder: Path) -> None:
        """Read what `save` has written."""
        trunk, head = _parts_of(find_adapter(str(folder)))
        _fill(self._shared[0], self.adapter, trunk, str(folder))
        self.score.load_state_dict(head)


def put_critic_on(policy: PreTrainedModel, name: str | None) -> AdapterScorer:
    """Put a critic on the policy's base, to be trained.

    Args:
        policy: a `PeftModel`.
        name: an adapter for scores of the same base, from which the critic starts; `None` is for a new one like the
            policy's, with a head of zeros.

    Raises:
        InputError: for a policy without an adapter, or another base.
    """
    if name is not None:
        scorer = put_on(policy, saved_scorer(name), CRITIC)
    else:
        _check_adapted(policy)
        config = copy.deepcopy(policy.peft_config[policy.active_adapter])
        config.inference_mode = False
        # A copy of whole modules would be no adapter of the base in memory.
        config.modules_to_save = None
        _add(policy, CRITIC, config)
        scorer = AdapterScorer(policy, CRITIC)
    for parameter in scorer.own_parameters():
        parameter.requires_grad_()
    return scorer


def saved_scorer(name: str, **location: object) -> SavedAdapter:
    """Return a saved adapter for scores.

    Raises:
        InputError: for a whole model, or an adapter of another task.
    """
    saved = find_adapter(name, **location)
    if saved is None:
        raise InputError(
            f"model {name!r} is no adapter: shared_base takes adapters of the policy's base, as `hfllm reward "
            "--use_peft` saves them"
        )
    saved.check("SEQ_CLS")
    return saved


def put_on(policy: PreTrainedModel, saved: SavedAdapter, adapter: str) -> AdapterScorer:
    """Put a saved adapter for scores on the policy's base, frozen.

    Args:
        policy: a `PeftModel`.
        adapter: its name in the policy.

    Raises:
        InputError: for a policy without an adapter, another base, or weights that do not fit.
    """
    _check_adapted(policy)
    _check_base(policy, saved)
    config, (trunk, head) = saved.config(), _parts_of(saved)
    config.task_type, config.inference_mode, config.modules_to_save = "CAUSAL_LM", False, None
    _add(policy, adapter, config)
    _fill(policy, adapter, trunk, saved.name)
    scorer = AdapterScorer(policy, adapter, head, saved.name)
    for parameter in scorer.own_parameters():
        parameter.requires_grad_(False)
    return scorer


def _check_adapted(policy: PreTrainedModel) -> None:
    if not hasattr(policy, "peft_config"):
        raise InputError("shared_base=True needs a policy with an adapter: peft_config (--use_peft), or a PeftModel")
    if len(policy.active_adapters) != 1:
        raise InputError(f"shared_base=True: adapters {', '.join(policy.active_adapters)} are active: activate one")
    refuse_if(reads_pictures(policy), "shared_base=True works with language models; this policy reads pictures")


def _check_base(policy: "PeftModel", saved: SavedAdapter) -> None:
    named = policy.peft_config[policy.active_adapter].base_model_name_or_path
    own = named or policy.get_base_model().config._name_or_path
    is_same = own == saved.base or (Path(own).is_dir() and Path(own).resolve() == Path(saved.base).resolve())
    if not is_same:
        raise InputError(
            f"adapter {saved.name!r} is one of the model {saved.base!r}, the policy's of {own!r}: shared_base takes "
            "adapters of the same base"
        )


def _add(policy: "PeftModel", adapter: str, config: "PeftConfig") -> None:
    """Add an adapter beside the active one."""
    if adapter in policy.peft_config:
        raise InputError(f"the policy has an adapter {adapter!r} already, a name that shared_base needs: rename it")
    with trained_as_before(policy):
        try:
            policy.add_adapter(adapter, config)
        except (KeyError, NotImplementedError, ValueError) as error:
            raise InputError(f"shared_base: PEFT allows no adapter {adapter!r} here: {one_line(error)}") from error
        policy.set_adapter(policy.active_adapter)


def _parts_of(saved: SavedAdapter) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the weights of a saved adapter for scores: of its trunk as they are named, and of its head."""
    weights = saved.weights()
    head = {name.rpartition(".")[2]: value for name, value in weights.items() if name.split(".")[-2] in HEADS}
    if not head:
        raise InputError(f"adapter {saved.name!r} has no head for scores: train it on comparisons first")
    return {name: value for name, value in weights.items() if name.split(".")[-2] not in HEADS}, head


def _fill(policy: "PeftModel", adapter: str, weights: dict[str, torch.Tensor], name: str) -> None:
    """Set the weights of an adapter of the policy.

    Raises:
        InputError: when some have no place or another shape, or are missing.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    own = get_peft_model_state_dict(policy, adapter_name=adapter, save_embedding_layers=False)
    for left, what in ((weights.keys() - own.keys(), "has no place"), (own.keys() - weights.keys(), "is missing")):
        refuse_if(left, f"adapter {name!r} does not fit the policy's base: {min(left, default='')} {what}")
    for key, value in weights.items():
        if value.shape != own[key].shape:
            shapes = f"{tuple(value.shape)}, there {tuple(own[key].shape)}"
            raise InputError(f"adapter {name!r} does not fit the policy's base: {key} has the shape {shapes}")
    set_peft_model_state_dict(policy, weights, adapter_name=adapter)


# ---- rewards ----


class AdapterReward(RewardModel):
    """A reward model that is an adapter of the policy's base, and takes no other memory.

    `PPOTrainer` puts it on the policy.

    Args:
        name: the adapter's folder or Hub id.
        tokenizer: the reward model's own.
        batch_size: sequences in one forward pass.
        location: where `name` is, as `from_pretrained` takes it.

    Raises:
        InputError: see `saved_scorer`.
    """

    def __init__(self, name: str, tokenizer: "PreTrainedTokenizerBase", batch_size: int = 64, **location: object):
        self.saved, self.tokenizer, self.batch_size = saved_scorer(name, **location), tokenizer, batch_size
        self.model, self.__name__ = None, Path(name).name

    def __call__(self, prompts: Sequence, completions: Sequence, **columns: Sequence[object]) -> list[float]:
        why = f"adapter {self.saved.name!r} is on no policy yet: PPOTrainer(shared_base=True) puts it there"
        refuse_if(self.model is None, why)
        return super().__call__(prompts, completions, **columns)

    def put_on(self, policy: PreTrainedModel) -> None:
        """Put the adapter on the policy, once."""
        taken = [each for each in getattr(policy, "peft_config", {}) if each.startswith(REWARD)]
        scorer = put_on(policy, self.saved, f"{REWARD}_{len(taken)}")
        super().__init__(scorer, self.tokenizer, self.batch_size)


def put_rewards_on(policy: PreTrainedModel, rewards: Sequence[RewardModel]) -> None:
    """Put the adapters among the reward models on the policy."""
    for reward in rewards:
        if isinstance(reward, AdapterReward):
            reward.put_on(policy)
