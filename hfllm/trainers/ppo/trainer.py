"""Proximal policy optimization from rewards, on the stock `transformers.Trainer`.

Read top-down: the parts of the trainer, how a rollout is collected (sample, score, penalize, estimate
advantages), how the loss is computed, and logging and evaluation. The formulas are in `formulas.py`, the
models' forward pass in `actor_critic.py`, sampling in `sampling.py`, rewards in `rollout.py`, saving and resuming in
`base_trainer.py`.

A rollout is collected when its first micro-batch is requested; the dataloader repeats the rollout's prompts for each
micro-batch, so Trainer's own counting of steps, epochs and skipped batches stays correct.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import set_seed as seed_process
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from hfllm.environments.episodes import EnvironmentFactory
from hfllm.environments.tools import Tool
from hfllm.errors import InputError
from hfllm.flags import without_nested_secrets
from hfllm.generation.packed.model import release
from hfllm.multimodal import processors
from hfllm.multimodal.processors import ProcessingClass, tokenizer_of
from hfllm.trainers.engines import disable_dropout
from hfllm.trainers.monitors import StalledPolicy, StalledWeights
from hfllm.trainers.ppo import episodes, formulas
from hfllm.trainers.ppo.actor_critic import ActorCritic, entropy_of, scatter_to_mask
from hfllm.trainers.ppo.base_trainer import ActorCriticTrainer
from hfllm.trainers.ppo.config import PPOConfig, with_default_rates
from hfllm.trainers.ppo.formulas import KLController, RunningMoments
from hfllm.trainers.ppo.prompts import PretrainingBatches, Rows, check_prompts, read_rows, rollout_loader
from hfllm.trainers.ppo.rollout import (
    COUNTS,
    Batch,
    Rollout,
    Scorer,
    Scores,
    model_inputs,
    pad_prompts,
    with_actions,
    with_replaced,
)
from hfllm.trainers.ppo.setup import (
    RewardFunc,
    build_rewards,
    check_uses,
    check_value_model,
    place_frozen,
    policy_from_name,
    processing_class_of,
    reward_models,
    reward_weights,
    sampling_config,
    scorer_from_name,
    shared_critic,
    shortest_context,
    special_tokens,
    split_reference,
    with_total_steps,
)
from hfllm.trainers.ppo.shared_base import put_rewards_on
from hfllm.trainers.ppo.vllm_sampling import VllmSampler

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig

# Mean nats between the log-probabilities of a token in two engines with the same weights that rounding explains.
WIDEST_GAP = 0.1
RolloutFunc = Callable[[list, "PPOTrainer"], dict[str, Any]]


class Tokens(NamedTuple):
    """Outputs of the models at the actions, each (B, R) and 0 elsewhere."""

    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    kl: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor


class PPOTrainer(ActorCriticTrainer):
    """PPO for language models (Ouyang et al. 2022, arXiv:2203.02155) with GRPOTrainer's signature.

    Args:
        model: the policy, a causal language model or its name; of a PeftModel the first state is the reference.
        reward_funcs: one reward or a list: a function `(prompts, completions, **columns) -> list[float]`, or of lists
            with one number per entry of `completion_ids`; a sequence- or token-classification model with one label, or
            the name of one; a `RewardEnsemble`. The policy is trained on their sum weighted by `args.reward_weights`.
        args: a `PPOConfig`.
        train_dataset: rows with a `prompt`, text or a list of messages; all other columns go to the functions. With a
            column `image` or `images` the policy reads images (docs/guides/vision.md).
        eval_dataset: the same, for `evaluate`.
        processing_class: the policy's tokenizer, for images its processor; by default from the model's name.
        reward_processing_classes: a tokenizer per reward model, `None` for functions; loaded by name if absent.
        value_model: a sequence- or token-classification model with one label or its name, such as the reward model;
            `None` trains a value head on the policy's trunk, at half the cost. With `args.shared_base` it is the name
            of an adapter of the policy's base; `None` trains a new one.
        callbacks, optimizers: as in `Trainer`.
        peft_config: train an adapter of this kind; the reference is then the policy without its adapter.
        ptx_dataset: rows with `text`, whose language-modeling loss is weighted by `args.ptx_coef` (Ouyang et al. 2022,
            equation 2).
        tools: functions for the policy to call, with annotated arguments and a docstring in Google's style; prompts
            are lists of messages then, and completions too, with the calls and the results of the tools.
        rollout_func: a function `(prompts, trainer) -> dict` that samples instead of the trainer, see
            `episodes.from_rollout_func`; it may put tokens of an environment between the policy's.
        environment_factory: makes environments whose methods are tools, see `StatefulEnvironments`; one with a
            `get_reward` adds it to the rewards, with weight 1, and `reward_funcs` may be left out.

    Raises:
        InputError: for a tokenizer without padding or end token, an unusable dataset or a bad reward.
    """

    # compute_loss divides by the tokens of the whole mini-batch itself.
    loss_is_scaled_for_ga = True
    _tag_names = ["hfllm", "ppo"]
    loss_label = "PPO loss (policy and critic)"

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: PPOConfig | None = None,
        train_dataset: "Dataset | list[dict[str, Any]] | None" = None,
        eval_dataset: "Dataset | list[dict[str, Any]] | dict[str, Dataset] | None" = None,
        processing_class: ProcessingClass | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None = None,
        value_model: str | PreTrainedModel | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: "PeftConfig | None" = None,
        ptx_dataset: "Dataset | None" = None,
        tools: Sequence[Tool] | None = None,
        rollout_func: RolloutFunc | None = None,
        environment_factory: EnvironmentFactory | Mapping[str, EnvironmentFactory] | None = None,
    ):
        name = model if isinstance(model, str) else model.config._name_or_path
        args = args or PPOConfig(f"{Path(name).name or 'policy'}-PPO")
        set_seed(args.seed)
        load_kwargs = args.model_init_kwargs or {}
        processing_class = processing_class or processing_class_of(model, load_kwargs)
        tokenizer = tokenizer_of(processing_class)
        if isinstance(model, str):
            model = policy_from_name(model, load_kwargs)
        if isinstance(value_model, str) and not args.shared_base:
            value_model = scorer_from_name(value_model, load_kwargs)
        self.has_reference = args.kl_coef > 0
        self.reference, policy = split_reference(model, peft_config, keep=self.has_reference)
        if args.sync_ref_model and self.reference is None:
            raise InputError("sync_ref_model=True needs a separate reference: no adapter, and kl_coef above 0")
        if args.shared_base:
            value_model = shared_critic(value_model, policy, args)
        self.eos_token_ids, never_sampled = special_tokens(processing_class, policy, args)
        if args.disable_dropout:
            disable_dropout(policy, value_model)
        self.context, self.rollout_func = shortest_context(policy, value_model), rollout_func
        ends = self.eos_token_ids
        unable = processors.unable_to_read(policy)
        parts = (tools, environment_factory, rollout_func, tokenizer if unable else processing_class, ends, args)
        self.environment = episodes.environment_of(*parts)
        own = episodes.own_rewards(self.environment)
        rewards = build_rewards(reward_funcs, reward_processing_classes, load_kwargs, tokenizer, args, own)
        put_rewards_on(policy, reward_models(rewards))
        check_value_model(value_model, policy, reward_models(rewards))
        weights = [*reward_weights(args.reward_weights, len(rewards) - len(own)), *([1.0] * len(own))]
        self.scorer = Scorer(rewards, weights, tokenizer, args)
        schemas = self.environment and self.environment.schemas_of
        fits = (processing_class, args.response_length, self.context, schemas, unable)
        datasets = [train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])]
        counts = [(check_prompts(each, *fits), len(each)) for each in datasets if each is not None]
        check_uses(args, counts, value_model, rollout_func is not None)
        self.ptx = PretrainingBatches.build(ptx_dataset, tokenizer, shortest_context(policy), args)
        if optimizers[0] is None:
            args = with_default_rates(args, policy, value_model)
        # Everything is loaded, and `args` are saved: without a token.
        args = without_nested_secrets(with_total_steps(args))
        super().__init__(
            model=ActorCritic(policy, value_model, args.temperature, never_sampled),
            args=args,
            data_collator=list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[*(callbacks or []), StalledPolicy(self._unlogged_rewards), StalledWeights()],
            optimizers=optimizers,
        )
        self._check_engine()
        self._check_optimizer()
        # Each process samples with its own random numbers, as in GRPOTrainer.
        seed_process(args.seed, device_specific=True)
        place_frozen((self.reference, *(reward.model for reward in reward_models(rewards))), self.accelerator.device)
        self._begin_sampling(tokenizer, never_sampled)

    def _begin_sampling(self, tokenizer: PreTrainedTokenizerBase, never_sampled: list[int]) -> None:
        """Set what samples and steers, after Trainer has set its own parts."""
        args = self.args
        self.sampling_config = sampling_config(args, tokenizer, self.eos_token_ids, never_sampled)
        parts = (self.policy, self.accelerator, tokenizer, self.sampling_config, args.local_rollout_batch_size)
        self.vllm = VllmSampler(args, *parts) if args.use_vllm else None
        if self.environment is not None:
            episodes.check_engine(self, "tools")
        if args.dynamic_sampling_rounds:
            episodes.check_engine(self, "dynamic_sampling_rounds")
            if self.environment is not None and args.deepspeed_plugin is not None:
                # Its processes count their images together whenever they sample.
                raise InputError("dynamic_sampling_rounds with tools and DeepSpeed: use DDP")
        self.kl_controller = KLController(args.kl_coef, args.kl_target, args.kl_horizon)
        self.completions: list[dict[str, Any]] = []
        self._has_said_gap = False
        self._begin()

    @property
    def reward_moments(self) -> RunningMoments:
        """Return the running mean and variance of the scores."""
        return self.scorer.moments

    @property
    def episodes(self) -> int:
        """Return the number of episodes sampled for the updates so far, over all processes."""
        rollouts = -(-self.state.global_step // self.args.steps_per_rollout)
        return rollouts * self.args.local_rollout_batch_size * self.args.world_size

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader:
        """Return batches of one rollout's prompts, each repeated for every backward pass on that rollout."""
        if self.train_dataset is None:
            raise ValueError("PPOTrainer: training requires a train_dataset")
        loader = rollout_loader(self.train_dataset, self.args, lambda: int(self.state.epoch or 0))
        return self.accelerator.prepare(loader)

    # ---- the algorithm: rollouts ----

    @torch.no_grad()
    def collect_rollout(self, rows: list[dict[str, Any]]) -> Rollout:
        """Sample a response to each row's prompt, score it, and estimate the advantage of each of its tokens."""
        batch = with_actions(self.sample(rows))
        ending = self.scorer.begin(rows, batch, self.state)
        if self.args.dynamic_sampling_rounds:
            batch, scores = self._redrawn(batch, self._noted(ending(), batch))
            tokens = self.evaluate_tokens(batch)
        else:
            # Async rewards go on while policy, reference and critic read the responses.
            tokens = self.evaluate_tokens(batch)
            scores = self._noted(ending(), batch)
        mask = batch["action_mask"].to(tokens.logprobs.dtype)
        advantages, returns = self._estimates(scores, tokens, mask)
        if self.args.importance_sampling_cap is not None and "sampling_logprobs" in batch:
            advantages = advantages * self._importance(tokens.logprobs, batch["sampling_logprobs"], mask)
        self._log_rollout(tokens, mask)
        self._metrics["explained_variance"].append(formulas.explained_variance(tokens.values, returns, mask).view(1))
        self._keep_completions(f"{self.state.global_step:06d}")
        self._steer_kl(tokens.kl.sum(1))
        order = torch.stack([torch.randperm(len(rows)) for _ in range(self.args.num_ppo_epochs)]).to(mask.device)
        return Rollout(
            **model_inputs(batch),
            logprobs=tokens.logprobs,
            ref_logprobs=tokens.ref_logprobs,
            values=tokens.values,
            advantages=advantages,
            returns=returns,
            order=order,
            mini_batch_tokens=self._in_mini_batches(mask.sum(1), order),
            **self._positives(scores.reward, mask, order),
        )

    def _in_mini_batches(self, lengths: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """Return the sums (epochs, mini-batches) of the episodes' lengths (N,) over all processes, at least 1."""
        shape = (self.args.num_ppo_epochs, self.args.num_mini_batches, -1)
        return self._sum_over_processes(lengths[order].view(shape).sum(-1)).clamp(min=1)

    def _positives(self, reward: torch.Tensor, mask: torch.Tensor, order: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what a rollout says of answers whose likelihood is learned, nothing if `positive_lm_coef` is 0."""
        if not self.args.positive_lm_coef:
            return {}
        is_positive = (reward >= self.args.positive_lm_min_reward).to(mask.dtype)
        self._metrics["positive"].append(is_positive)
        tokens = self._in_mini_batches(mask.sum(1) * is_positive, order)
        return {"is_positive": is_positive, "mini_batch_positive_tokens": tokens}

    def _redrawn(self, batch: dict[str, Any], scores: Scores) -> tuple[dict[str, Any], Scores]:
        """Replace prompts whose answers all earn the same, and so teach nothing beside each other, by others.

        Up to `dynamic_sampling_rounds` times (Yu et al. 2025, arXiv:2503.14476, equation 11). Which prompts come is
        said by seed and step alone, so that a resumed run draws the same.
        """
        args, size, drawn = self.args, self.args.num_generations, 0
        seed = args.data_seed if args.data_seed is not None else args.seed
        place = self.state.global_step * args.world_size + args.process_index
        generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + place)
        for attempt in range(args.dynamic_sampling_rounds + 1):
            groups = scores.reward.view(-1, size)
            highest, lowest = groups.amax(1), groups.amin(1)
            # Sums of like rewards for tokens differ by rounding.
            alike = (highest - lowest <= 1e-6 * highest.abs().clamp(min=1)).nonzero().squeeze(1)
            if not len(alike) or attempt == args.dynamic_sampling_rounds:
                break
            drawn += len(alike)
            indices = torch.randint(len(self.train_dataset), (len(alike),), generator=generator).tolist()
            rows = Rows(self.train_dataset[index] for index in indices for _ in range(size))
            rows = rows.to(self.accelerator.device)
            other = with_actions(self.sample(rows))
            places = (alike.unsqueeze(1) * size + torch.arange(size, device=alike.device)).flatten()
            scores = scores.with_replaced(self.scorer.begin(rows, other, self.state)(), places)
            batch = with_replaced(batch, other, places, self.sampling_config.pad_token_id)
        for name, count in {"redrawn_prompts": drawn, "prompts_alike": len(alike)}.items():
            self._metrics[name].append(scores.reward.new_tensor([count / len(groups)]))
        return batch, scores

    def _estimates(self, scores: Scores, tokens: Tokens, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the advantages and the critic's returns (B, R) of a rollout."""
        args = self.args
        total = self.scorer.rescale(scores.total, self._sum_over_processes)
        if args.baseline == "both":
            whole = total if scores.per_token is None else total + scores.per_token.sum(1)
            total = total - formulas.means_of_others(whole, args.num_generations)
        per_token = scores.per_token
        if per_token is not None:
            # Answers drawn again may be longer than those whose tokens were paid.
            per_token = nn.functional.pad(per_token, (0, mask.shape[1] - per_token.shape[1]))
        rewards = formulas.token_rewards(
            total,
            tokens.kl,
            mask,
            self.kl_controller.coefficient if args.kl_penalty == "reward" else 0.0,
            per_token,
        )
        if args.whiten_rewards:
            rewards = formulas.masked_whiten(rewards, mask, shift_mean=False, reduce=self._sum_over_processes)
        if args.baseline == "group":
            parts = (rewards, torch.zeros_like(rewards), mask, args.gamma)
            returns, _ = formulas.generalized_advantages(*parts, lam=1.0)
            # The first token's return is the whole response's.
            whole = formulas.first_chosen(returns, mask)
            advantages = (returns - formulas.means_of_others(whole, args.num_generations).unsqueeze(1)) * mask
        else:
            value_lam = args.value_lam
            if self.state.global_step < args.critic_warmup_steps and args.critic_warmup_lam is not None:
                value_lam = args.critic_warmup_lam
            lam = formulas.default_lam(mask) if args.lam is None else args.lam
            if args.lam_alpha is not None:
                lam = formulas.length_adaptive_lam(mask, args.lam_alpha)
            advantages, returns = formulas.generalized_advantages(
                rewards, tokens.values, mask, args.gamma, lam, value_lam
            )
        if args.whiten_advantages:
            advantages = formulas.masked_whiten(advantages, mask, reduce=self._sum_over_processes)
        if args.advantage_clip is not None:
            advantages = advantages.clamp(-args.advantage_clip, args.advantage_clip)
        return advantages, returns

    def _importance(self, logprobs: torch.Tensor, sampled: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the weights (B, R) of what another engine or policy has sampled, and log how far it is from ours."""
        args = self.args
        # Unknown ones, as vLLM may have, weigh 1.
        sampled = torch.where(sampled.isnan(), logprobs, sampled)
        weights, capped = formulas.importance_weights(
            logprobs, sampled, mask, args.importance_sampling_cap, args.importance_sampling_level
        )
        is_chosen = mask > 0
        gap = (logprobs - sampled)[is_chosen].abs()
        for name, values in {"weight": weights[is_chosen], "capped": capped[is_chosen], "gap": gap}.items():
            self._metrics[f"importance_sampling/{name}"].append(values)
        spread = weights[is_chosen].std(correction=0) if is_chosen.any() else weights.new_zeros(())
        self._metrics["importance_sampling/weight_std"].append(spread.view(1))
        mean = gap.mean().item() if len(gap) else 0.0
        if mean > WIDEST_GAP and not self._has_said_gap:
            self._has_said_gap = True
            warnings.warn(
                f"what sampled the responses gives their tokens log-probabilities {mean:.2f} nats from the policy's, "
                f"on average: more than rounding does ({WIDEST_GAP}). Does it have the same weights, temperature and "
                "other settings?",
                stacklevel=2,
            )
        return weights

    def sample(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Sample responses to the rows' prompts. Return prompts and responses with their masks, and `is_ended`.

        Where an environment wrote some of the tokens, `action_mask` marks the ones chosen by the policy.
        """
        if self.rollout_func is not None:
            was_training = self.policy.training
            self.policy.eval()
            output = self.rollout_func([row["prompt"] for row in rows], self)
            self.policy.train(was_training)
            return episodes.from_rollout_func(output, rows, self)
        if self.environment is not None:
            return episodes.act(rows, self.environment, self)
        prompts, picture_fields = read_rows(rows, self.processing_class)
        prompt_ids, prompt_mask = pad_prompts(prompts, self.sampling_config.pad_token_id, self.accelerator.device)
        witness = self._witness(len(rows))
        if self.vllm is not None:
            responses = self.vllm(prompts, self.state.global_step, prompt_ids.device)
        else:
            responses = self._responses(prompt_ids, prompt_mask, witness, pictures=picture_fields.get("pictures"))
        return {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            **responses,
            **picture_fields,
            "witness": witness,
        }

    def score(self, rows: list[dict[str, Any]], batch: dict[str, torch.Tensor], prefix: str = "") -> Scores:
        """Return the scores of the responses, and log their means."""
        return self._noted(self.scorer.begin(rows, batch, self.state)(), batch, prefix)

    def _noted(self, scores: Scores, batch: dict[str, torch.Tensor], prefix: str = "") -> Scores:
        for name, values in scores.metrics.items():
            self._logged[prefix][name] += values
        for name, values in scores.parts.items():
            self._metrics[f"{prefix}rewards/{name}"].append(values)
        self._metrics[f"{prefix}reward"].append(scores.reward)
        if not prefix:
            self._metrics["reward_std"].append(scores.reward.std(correction=0).view(1))
        self._metrics[f"{prefix}unfinished"].append(1.0 - batch["is_ended"].float())
        for name, values in batch.get("metrics", {}).items():
            self._metrics[f"{prefix}{name}"].append(values)
        self.completions = scores.completions
        return scores

    @torch.no_grad()
    def evaluate_tokens(self, batch: dict[str, Any]) -> Tokens:
        """Evaluate the response tokens with policy, reference and critic. Without a reference the KL is 0."""
        actor, args = self.actor, self.args
        was_training = actor.training
        actor.eval()
        batch = with_actions(batch)
        inputs, witness = model_inputs(batch), self._believed(batch)
        results = [torch.zeros(batch["response_mask"].shape, device=self.accelerator.device) for _ in Tokens._fields]
        for rows, chunk in self._passes(inputs, args.local_rollout_forward_batch_size):
            mask = chunk["action_mask"] > 0
            with self.accelerator.autocast():
                logprobs, entropy, values, distribution = self._own_view(chunk, rows, witness)
                ref_logprobs = logprobs
                if self.has_reference:
                    ref_logprobs, ref_distribution = self._reference(chunk, args.kl_estimator == "full")
            if distribution is None or not self.has_reference:
                kl = formulas.kl_estimate(
                    logprobs, ref_logprobs, "k1" if distribution is not None else args.kl_estimator
                )
            else:
                kl = scatter_to_mask(formulas.full_kl(distribution, ref_distribution), mask)
            for result, part in zip(results, (logprobs, ref_logprobs, kl, entropy, values), strict=True):
                result[rows, : part.shape[1]] = part
        actor.train(was_training)
        self._remember(batch, witness)
        return Tokens(*results)

    def _steer_kl(self, kl: torch.Tensor) -> None:
        total, episodes = self._sum_over_processes(torch.stack((kl.sum(), kl.new_tensor(len(kl))))).tolist()
        used = self.kl_controller.coefficient
        self.kl_controller.update(total / episodes, int(episodes))
        # The loss is computed afterwards, with the new weight.
        used = used if self.args.kl_penalty == "reward" else self.kl_controller.coefficient
        self._metrics["kl_coef"].append(kl.new_tensor([used]))

    # ---- the algorithm: updates ----

    def training_step(
        self, model: nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run the backward passes on a micro-batch of the current rollout, and collect a new rollout when due.

        One pass per group of sequences of similar length; their sum is the micro-batch's gradient.
        """
        step = self.state.global_step % self.args.steps_per_rollout
        if self._rollout is None or (step == 0 and self._micro_step == 0):
            self._sync_reference()
            self._rollout, self._skipped_from = self.collect_rollout(inputs), None
            release(self.policy)
        is_last = self._micro_step == self.args.gradient_accumulation_steps - 1
        loss = torch.zeros((), device=self.accelerator.device)
        if self._skipped_from is None:
            batch = self._rollout.micro_batch(step, self._micro_step, self.args.per_device_train_batch_size)
            counts = {name: batch.pop(name) for name in COUNTS if name in batch}
            # The number of passes depends on it.
            model.train()
            groups = [group for _, group in self._passes(batch)]
            for at, group in enumerate(groups):
                # Only the last pass of an optimizer step lets DDP average the gradients.
                waits = at < len(groups) - 1
                with self.accelerator.no_sync(model) if waits else nullcontext():
                    group = {**group, **counts, "adds_ptx": not waits}
                    loss += super().training_step(model, group, num_items_in_batch)
            self._end_micro_batch(is_last)
        self._micro_step = 0 if is_last else self._micro_step + 1
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the clipped policy loss plus `vf_coef` times the value loss and the optional terms.

        Sums over the group are divided by the mini-batch's tokens on *all* processes, and multiplied by the number of
        processes because DDP averages gradients: the gradient is the same as for one large batch.
        """
        args, mask = self.args, inputs["action_mask"].to(torch.float32)
        weights, share = mask, self.accelerator.num_processes / inputs["mini_batch_tokens"]
        if args.loss_aggregation == "sequence":
            # Each response counts alike, however long it is.
            weights = mask / mask.sum(1, keepdim=True).clamp(min=1)
            share = torch.ones_like(share) / (args.per_device_train_batch_size * args.gradient_accumulation_steps)
        is_warmup = self.state.global_step < args.critic_warmup_steps
        chunk, needs_distribution = model_inputs(inputs), self._penalizes_full_kl or args.entropy_coef > 0
        logprobs, values, distribution = model(
            **chunk, with_distribution=needs_distribution, detach_trunk=is_warmup or args.baseline == "group"
        )
        policy_sum, clipped = formulas.policy_loss(
            *(logprobs, inputs["logprobs"], inputs["advantages"], weights),
            *(args.cliprange, args.dual_clip, args.cliprange_high),
        )
        value_sum, value_clipped = formulas.value_loss(
            values, inputs["values"], inputs["returns"], weights, args.cliprange_value
        )
        loss = policy_sum + self._regularization(chunk, inputs, logprobs, distribution, weights)
        # During the critic's warm-up the policy loss has weight 0 but stays, since DDP waits for all gradients.
        loss = ((0.0 if is_warmup else 1.0) * loss + args.vf_coef * value_sum) * share
        if "is_positive" in inputs and not is_warmup:
            likelihood = (logprobs * mask * inputs["is_positive"].unsqueeze(1)).sum()
            positive_share = self.accelerator.num_processes / inputs["mini_batch_positive_tokens"]
            loss = loss - args.positive_lm_coef * likelihood * positive_share
            self._add(positive_share, positive_lm_loss=-likelihood)
        if inputs.get("adds_ptx") and self.ptx is not None and not is_warmup:
            loss = loss + self._ptx_loss()
        self._check_finite(loss, inputs)
        log_ratio = (logprobs.detach() - inputs["logprobs"]) * mask
        approx_kl = (formulas.kl_estimate(torch.zeros_like(log_ratio), log_ratio, "k3") * weights).sum()
        self._add(share, policy_loss=policy_sum, value_loss=value_sum, clip_fraction=clipped)
        self._add(share, value_clip_fraction=value_clipped, approx_kl=approx_kl)
        return loss

    @property
    def _penalizes_full_kl(self) -> bool:
        return self.args.kl_penalty == "loss" and self.args.kl_estimator == "full"

    def _regularization(
        self,
        chunk: Batch,
        inputs: dict[str, torch.Tensor],
        logprobs: torch.Tensor,
        distribution: torch.Tensor | None,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """Return the weighted sums of a KL penalty in the loss, and of the entropy bonus."""
        args, mask = self.args, inputs["action_mask"]
        total = torch.zeros((), device=weights.device)
        if args.kl_penalty == "loss" and self.has_reference:
            if self._penalizes_full_kl:
                with self.accelerator.autocast():
                    kl = formulas.full_kl(distribution, self._reference(chunk, True)[1]) * weights[mask > 0]
            else:
                # Masked first, since k3 may overflow elsewhere.
                kl = formulas.kl_estimate(logprobs, inputs["ref_logprobs"] * mask, args.kl_estimator) * weights
            total = total + self.kl_controller.coefficient * kl.sum()
        if args.entropy_coef:
            total = total - args.entropy_coef * (entropy_of(distribution) * weights[mask > 0]).sum()
        return total

    def _ptx_loss(self) -> torch.Tensor:
        """Return the weighted language-modeling loss on this micro-batch's share of the pretraining data.

        As with the other terms, sums are divided by the tokens of the whole optimizer step on all processes.
        """
        passes, processes = self.args.gradient_accumulation_steps, self.args.world_size
        index = (self.args.process_index, processes, self.accelerator.device)
        first = self.state.global_step * passes
        if self._micro_step == 0:
            counts = [self.ptx.targets(self.ptx.batch(first + at, *index)) for at in range(passes)]
            self._ptx_targets = self._sum_over_processes(torch.stack(counts).sum())
        batch = self.ptx.batch(first + self._micro_step, *index)
        with self.accelerator.autocast():
            mean = self.policy(**batch, use_cache=False).loss
        loss = mean * self.ptx.targets(batch) / self._ptx_targets * processes
        self._add(torch.ones((), device=loss.device), ptx_loss=loss)
        return self.args.ptx_coef * loss

    def _end_micro_batch(self, is_last: bool) -> None:
        if self.state.global_step < self.args.critic_warmup_steps:
            # Without a gradient the optimizer skips these weights; a gradient of zero would still decay them.
            critic = {id(parameter) for parameter in self.actor.critic_parameters()}
            for parameter in self.actor.parameters():
                if id(parameter) not in critic:
                    parameter.grad = None
        if not is_last:
            return
        if self.args.target_kl is not None:
            approx_kl = self._sum_over_processes(self._sums["approx_kl"]).item() / self.accelerator.num_processes
            if approx_kl > self.args.target_kl:
                self._skipped_from = self.state.global_step + 1
        for name, total in self._sums.items():
            self._metrics[name].append(total.view(1))
        self._sums = {}

    # ---- logging ----

    def _log_rollout(self, tokens: Tokens, mask: torch.Tensor, prefix: str = "") -> None:
        if self.has_reference:
            # The same estimate for every kind of penalty, to keep runs comparable.
            kl = formulas.kl_estimate(tokens.logprobs, tokens.ref_logprobs) * mask
            self._metrics[f"{prefix}kl"].append(kl.sum(1))
        self._metrics[f"{prefix}entropy"].append(tokens.entropy.sum(1) / mask.sum(1).clamp(min=1))
        self._metrics[f"{prefix}response_length"].append(mask.sum(1))

    def _unlogged_rewards(self) -> dict[str, float]:
        """Return the means of `reward` and `reward_std` since the last log, over all processes."""
        names = ("reward", "reward_std")
        return {name: self._mean_over_processes(self._metrics[name]) for name in names if name in self._metrics}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the metrics of rollouts and updates since the last log, averaged over all processes."""
        is_evaluation = any(name.startswith("eval_") for name in logs)
        if not is_evaluation and "loss" in logs:
            # A name of the trainer's own stays its own.
            own = {**logs, **self._drain_metrics(""), "episode": self.episodes}
            logs = {**own, **self._drain_logged(""), **own}
        super().log(logs, start_time)
