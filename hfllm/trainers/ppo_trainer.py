"""Proximal policy optimisation from rewards, on the stock `transformers.Trainer`.

Read top-down: what the trainer is made of, how a rollout is collected (sample, score, penalise, estimate
advantages), how the loss is made of it, and what is logged, evaluated, saved and resumed. The formulas are in
`advantages.py`, the tensors in `rollout.py`.

A rollout is collected when its first micro-batch is asked for; the dataloader repeats the rollout's prompts for each
micro-batch, so that Trainer's own counting of steps, epochs and skipped batches stays right.
"""

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import set_seed as seed_process
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput

from hfllm.data.tokenizer import tokenize_prompts
from hfllm.errors import InputError
from hfllm.rewards import RewardModel, checked_rewards, reward_name
from hfllm.trainers import advantages as formulas
from hfllm.trainers.ppo_config import PPOConfig
from hfllm.trainers.ppo_parts import (
    RewardFunc,
    build_rewards,
    disable_dropout,
    load_scorer,
    load_weights,
    reward_weights,
    sampling_config,
    special_tokens,
    split_reference,
    unique_names,
)
from hfllm.trainers.prompts import RolloutSampler, check_prompts
from hfllm.trainers.rollout import (
    ActorCritic,
    Rollout,
    chunks,
    pad_prompts,
    reference_logprobs,
    sample_responses,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig

VALUE_MODEL_FOLDER, VALUE_HEAD_FILE = "value_model", "value_head.safetensors"


class PPOTrainer(Trainer):
    """PPO for language models (Ouyang et al. 2022, arXiv:2203.02155) with GRPOTrainer's signature.

    Args:
        model: the policy, a causal language model or its name.
        reward_funcs: one reward or a list: a function `(prompts, completions, **columns) -> list[float]`, a
            sequence-classification model with one label, or the name of such a model. The policy is trained on
            their sum weighted by `args.reward_weights`.
        args: a `PPOConfig`.
        train_dataset: rows with a `prompt`, text or a list of messages; all other columns go to the functions.
        eval_dataset: the same, for `evaluate`.
        processing_class: the policy's tokenizer; loaded by the model's name if not given.
        reward_processing_classes: a tokenizer for each reward model, `None` for functions; loaded by name if absent.
        value_model: a sequence-classification model with one label or its name, such as the reward model; `None`
            trains a value head on the policy's trunk, which costs half as much.
        callbacks, optimizers: as in `Trainer`.
        peft_config: train an adapter of this kind; the reference is then the policy without its adapter.

    Raises:
        InputError: for a tokenizer without padding or end token, an unusable dataset or a bad reward.
    """

    # compute_loss divides by the tokens of the whole mini-batch itself.
    loss_is_scaled_for_ga = True
    _tag_names = ["hfllm", "ppo"]

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: RewardFunc | list[RewardFunc],
        args: PPOConfig | None = None,
        train_dataset: "Dataset | None" = None,
        eval_dataset: "Dataset | dict[str, Dataset] | None" = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None = None,
        value_model: str | PreTrainedModel | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: "PeftConfig | None" = None,
    ):
        name = model if isinstance(model, str) else model.config._name_or_path
        args = args or PPOConfig(f"{Path(name).name or 'policy'}-PPO")
        set_seed(args.seed)
        tokenizer = processing_class or AutoTokenizer.from_pretrained(name)
        load_kwargs = args.model_init_kwargs or {}
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model, **{"dtype": torch.float32, **load_kwargs})
        if isinstance(value_model, str):
            value_model = load_scorer(value_model, load_kwargs)
        self.reference, policy = split_reference(model, peft_config)
        self.eos_token_ids, never_sampled = special_tokens(tokenizer, policy)
        if args.disable_dropout:
            disable_dropout(policy, value_model)
        self.rewards = build_rewards(reward_funcs, reward_processing_classes, load_kwargs, args)
        self.reward_names = unique_names([reward_name(reward) for reward in self.rewards])
        self.reward_weights = reward_weights(args.reward_weights, len(self.rewards))
        context = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
        for dataset in (train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])):
            if dataset is not None:
                check_prompts(dataset, tokenizer, args.response_length, context)
        self._set_total_steps(args)
        super().__init__(
            model=ActorCritic(policy, value_model, args.temperature, never_sampled),
            args=args,
            data_collator=list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # Each process samples with its own noise, as in GRPOTrainer.
        seed_process(args.seed, device_specific=True)
        if self.reference is not None:
            self.reference.to(self.accelerator.device)
        for reward in self.rewards:
            if isinstance(reward, RewardModel):
                reward.model.to(self.accelerator.device)
        self.sampling_config = sampling_config(args, tokenizer, self.eos_token_ids, never_sampled)
        self.completions: list[dict[str, Any]] = []
        self._rollout: Rollout | None = None
        self._micro_step = 0
        self._metrics: dict[str, list[torch.Tensor]] = defaultdict(list)

    @property
    def actor(self) -> ActorCritic:
        """The trained module, without the engine around it."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def policy(self) -> PreTrainedModel:
        """The policy that is trained."""
        return self.actor.policy

    @staticmethod
    def _set_total_steps(args: PPOConfig) -> None:
        if args.total_episodes is not None:
            rollouts = -(-args.total_episodes // (args.local_rollout_batch_size * args.world_size))
            args.max_steps = rollouts * args.steps_per_rollout

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader:
        """Prompts of one rollout a batch, each batch repeated for every backward pass on that rollout."""
        if self.train_dataset is None:
            raise ValueError("PPOTrainer: training requires a train_dataset")
        sampler = RolloutSampler(
            len(self.train_dataset),
            rollout_size=self.args.local_rollout_batch_size * self.args.world_size,
            repeats=self.args.steps_per_rollout * self.args.gradient_accumulation_steps,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            epoch=lambda: int(self.state.epoch or 0),
        )
        loader = DataLoader(
            self.train_dataset,
            batch_size=self.args.local_rollout_batch_size,
            sampler=sampler,
            collate_fn=self.data_collator,
            drop_last=True,
            num_workers=self.args.dataloader_num_workers,
        )
        return self.accelerator.prepare(loader)

    # ---- the algorithm ----

    def training_step(
        self, model: nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One backward pass on a micro-batch of the current rollout, which is collected when it is due."""
        step = self.state.global_step % self.args.steps_per_rollout
        if self._rollout is None or (step == 0 and self._micro_step == 0):
            self._rollout = self.collect_rollout(inputs)
        batch = self._rollout.micro_batch(step, self._micro_step, self.args.per_device_train_batch_size)
        self._micro_step = (self._micro_step + 1) % self.args.gradient_accumulation_steps
        return super().training_step(model, batch, num_items_in_batch)

    @torch.no_grad()
    def collect_rollout(self, rows: list[dict[str, Any]]) -> Rollout:
        """Sample a response to each row's prompt, score it, and estimate the advantage of each of its tokens."""
        batch = self.sample(rows)
        scores = self.score(rows, batch)
        logprobs, ref_logprobs, entropy, values = self.evaluate_tokens(batch)
        mask = batch["response_mask"].to(logprobs.dtype)
        kl = formulas.kl_estimate(logprobs, ref_logprobs, self.args.kl_estimator) * mask
        rewards = formulas.token_rewards(scores, kl, mask, self.args.kl_coef)
        if self.args.whiten_rewards:
            rewards = formulas.masked_whiten(rewards, mask, shift_mean=False, reduce=self._sum_over_processes)
        advantages, returns = formulas.generalized_advantages(rewards, values, mask, self.args.gamma, self.args.lam)
        if self.args.whiten_advantages:
            advantages = formulas.masked_whiten(advantages, mask, reduce=self._sum_over_processes)
        self._log_rollout(scores, logprobs, ref_logprobs, entropy, values, returns, mask)
        episodes = len(rows)
        order = torch.stack([torch.randperm(episodes) for _ in range(self.args.num_ppo_epochs)]).to(mask.device)
        lengths = mask.sum(1)[order].view(self.args.num_ppo_epochs, self.args.num_mini_batches, -1).sum(-1)
        return Rollout(
            **batch,
            logprobs=logprobs,
            ref_logprobs=ref_logprobs,
            values=values,
            advantages=advantages,
            returns=returns,
            order=order,
            mini_batch_tokens=self._sum_over_processes(lengths).clamp(min=1),
        )

    def sample(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Sample a response to each row's prompt. Returns prompts and responses with their masks."""
        prompts = tokenize_prompts([row["prompt"] for row in rows], self.processing_class)
        prompt_ids, prompt_mask = pad_prompts(prompts, self.processing_class.pad_token_id, self.accelerator.device)
        response_ids, mask = sample_responses(
            self.policy, prompt_ids, prompt_mask, self.sampling_config, self.eos_token_ids
        )
        return {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "response_ids": response_ids,
            "response_mask": mask,
        }

    def score(self, rows: list[dict[str, Any]], batch: dict[str, torch.Tensor], prefix: str = "") -> torch.Tensor:
        """The weighted sum (B,) of all rewards of the responses, less the penalty where the end token is missing."""
        texts = self.processing_class.batch_decode(batch["response_ids"], skip_special_tokens=True)
        prompts = [row["prompt"] for row in rows]
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("prompt", "completion")}
        device = self.accelerator.device
        total = torch.zeros(len(rows), device=device)
        for name, reward, weight in zip(self.reward_names, self.rewards, self.reward_weights, strict=True):
            values = torch.tensor(checked_rewards(reward, prompts, completions, **columns), device=device)
            self._metrics[f"{prefix}rewards/{name}"].append(values)
            total += weight * values
        last = batch["response_ids"].gather(1, formulas.last_token_index(batch["response_mask"]).unsqueeze(1))
        is_ended = torch.isin(last.squeeze(1), torch.tensor(self.eos_token_ids, device=device))
        if self.args.missing_eos_penalty is not None:
            total -= self.args.missing_eos_penalty * ~is_ended
        self._metrics[f"{prefix}reward"].append(total)
        self._metrics[f"{prefix}unfinished"].append(1.0 - is_ended.float())
        self.completions = [
            {"prompt": prompt, "completion": text, "reward": reward}
            for prompt, text, reward in zip(prompts, texts, total.tolist(), strict=True)
        ]
        return total

    @torch.no_grad()
    def evaluate_tokens(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Log-probabilities, reference log-probabilities, entropies and values of the responses, each (B, R)."""
        actor, mask = self.actor, batch["response_mask"]
        was_training = actor.training
        actor.eval()
        results = [torch.zeros(mask.shape, device=mask.device) for _ in range(4)]
        for rows, chunk in chunks(batch, self.args.local_rollout_forward_batch_size):
            length = chunk["response_mask"].shape[1]
            with self.compute_loss_context_manager():
                logprobs, entropy, values = actor(**chunk)
                if self.reference is not None:
                    ref_logprobs = reference_logprobs(self.reference, actor, chunk)
                else:
                    with self.policy.disable_adapter():
                        ref_logprobs = reference_logprobs(self.policy, actor, chunk)
            for result, part in zip(results, (logprobs, ref_logprobs, entropy, values), strict=True):
                result[rows, :length] = part * chunk["response_mask"]
        actor.train(was_training)
        return tuple(results)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Clipped policy loss plus `vf_coef` times the clipped value loss, per token of the whole mini-batch.

        Sums over the micro-batch are divided by the mini-batch's tokens on *all* processes, and multiplied by the
        number of processes because DDP averages gradients: the gradient is that of one large batch.
        """
        mask = inputs["response_mask"].to(torch.float32)
        logprobs, _, values = model(
            inputs["prompt_ids"], inputs["prompt_mask"], inputs["response_ids"], inputs["response_mask"]
        )
        policy_sum, clipped = formulas.policy_loss(
            logprobs, inputs["logprobs"], inputs["advantages"], mask, self.args.cliprange
        )
        value_sum, value_clipped = formulas.value_loss(
            values, inputs["values"], inputs["returns"], mask, self.args.cliprange_value
        )
        share = self.accelerator.num_processes / inputs["mini_batch_tokens"]
        log_ratio = (logprobs.detach() - inputs["logprobs"]) * mask
        sums = {
            "policy_loss": policy_sum,
            "value_loss": value_sum,
            "clip_fraction": clipped,
            "value_clip_fraction": value_clipped,
            "approx_kl": formulas.kl_estimate(torch.zeros_like(log_ratio), log_ratio, "k3").sum(),
        }
        # A micro-batch is one of several in an optimiser step; times their number the mean over them is the total.
        for name, total in sums.items():
            self._metrics[name].append((total.detach() * share * self.args.gradient_accumulation_steps).view(1))
        return (policy_sum + self.args.vf_coef * value_sum) * share

    def _sum_over_processes(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")

    # ---- logging and evaluation ----

    def _log_rollout(self, scores, logprobs, ref_logprobs, entropy, values, returns, mask, prefix="") -> None:
        kl = formulas.kl_estimate(logprobs, ref_logprobs) * mask
        self._metrics[f"{prefix}kl"].append(kl.sum(1))
        self._metrics[f"{prefix}entropy"].append((entropy * mask).sum(1) / mask.sum(1).clamp(min=1))
        self._metrics[f"{prefix}response_length"].append(mask.sum(1))
        if not prefix:
            self._metrics["reward_std"].append(scores.std(correction=0).view(1))
            explained = formulas.explained_variance(values, returns, mask)
            self._metrics["explained_variance"].append(explained.view(1))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with what the rollouts and updates since the last log added, averaged over all processes."""
        is_evaluation = any(name.startswith("eval_") for name in logs)
        if not is_evaluation and "loss" in logs:
            logs = {**logs, **self._drain_metrics("")}
            logs["episode"] = (
                -(-self.state.global_step // self.args.steps_per_rollout)
                * self.args.local_rollout_batch_size
                * self.args.world_size
            )
        super().log(logs, start_time)

    def _drain_metrics(self, prefix: str) -> dict[str, float]:
        names = [name for name in self._metrics if name.startswith("eval_") == bool(prefix)]
        means = {}
        for name in names:
            values = torch.cat(self._metrics.pop(name))
            total, count = self._sum_over_processes(torch.stack((values.sum(), values.new_tensor(len(values)))))
            means[name] = (total / count).item()
        return means

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Sample and score the evaluation prompts. Metrics: reward, its parts, KL, entropy, response length."""
        prefix, count = "eval_", 0
        # The same noise each time, and training's own random state left as it was.
        with torch.random.fork_rng():
            torch.manual_seed(self.args.seed + self.args.process_index)
            for rows in dataloader:
                batch = self.sample(rows)
                scores = self.score(rows, batch, prefix)
                logprobs, ref_logprobs, entropy, values = self.evaluate_tokens(batch)
                mask = batch["response_mask"].to(logprobs.dtype)
                self._log_rollout(scores, logprobs, ref_logprobs, entropy, values, values, mask, prefix)
                for name, parts in self._metrics.items():
                    if name.startswith(prefix):
                        # Without the rows that fill up the last batch of some processes.
                        parts[-1] = self.accelerator.gather_for_metrics(parts[-1])
                count += len(rows)
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        metrics = {
            name.replace(prefix, f"{metric_key_prefix}_", 1): value
            for name, value in self._drain_metrics(prefix).items()
        }
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=count)

    # ---- saving and resuming ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        output = Path(output_dir or self.args.output_dir)
        actor = self.actor
        state = state_dict or actor.state_dict()

        def part(prefix: str) -> dict[str, torch.Tensor]:
            return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

        self.policy.save_pretrained(output, state_dict=part("policy."))
        if actor.value_model is not None:
            actor.value_model.save_pretrained(output / VALUE_MODEL_FOLDER, state_dict=part("value_model."))
        else:
            from safetensors.torch import save_file

            save_file({"weight": part("value_head.")["weight"].contiguous()}, output / VALUE_HEAD_FILE)
        self.processing_class.save_pretrained(output)

    def _save_rng_state(self, output_dir: str) -> None:
        # The part of a checkpoint that each process writes for itself: the rollout goes with it.
        super()._save_rng_state(output_dir)
        if self._rollout is not None:
            self._rollout.save(self._rollout_file(output_dir))

    def _rollout_file(self, folder: str) -> Path:
        return Path(folder) / f"rollout_{self.args.process_index}.safetensors"

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        self._load_actor(folder)
        saved = len(list(folder.glob("rollout_*.safetensors")))
        if saved and saved != self.args.world_size:
            raise InputError(f"{folder} was saved by {saved} processes; this run has {self.args.world_size}")
        if (file := self._rollout_file(resume_from_checkpoint)).is_file():
            self._rollout = Rollout.load(file, self.accelerator.device)

    def _load_best_model(self) -> None:
        self._load_actor(Path(self.state.best_model_checkpoint))

    def _load_actor(self, folder: Path) -> None:
        from safetensors.torch import load_file

        actor = self.actor
        if hasattr(self.policy, "peft_config"):
            from peft import set_peft_model_state_dict
            from peft.utils import load_peft_weights

            set_peft_model_state_dict(self.policy, load_peft_weights(str(folder), device="cpu"))
        else:
            load_weights(self.policy, folder)
        if actor.value_model is not None:
            load_weights(actor.value_model, folder / VALUE_MODEL_FOLDER)
        else:
            actor.value_head.load_state_dict(load_file(folder / VALUE_HEAD_FILE))
