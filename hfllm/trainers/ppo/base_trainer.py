"""A `transformers.Trainer` whose model is an `ActorCritic`: optimizer, passes, metrics, checkpoints."""

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import GenerationConfig, PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from hfllm.errors import InputError, refuse_if
from hfllm.models.devices import forked_random, most_logits, most_tokens, refuse_data_parallel
from hfllm.multimodal.processors import ImageTensors, Pictures, tokenizer_of
from hfllm.outputs.checkpoints import last_complete_checkpoint
from hfllm.trainers.callbacks import log_table, storable
from hfllm.trainers.engines import gather_parameters
from hfllm.trainers.mixins import save_on_sigterm, train_unless_done
from hfllm.trainers.ppo.actor_critic import ActorCritic, entropy_of, scatter_to_mask
from hfllm.trainers.ppo.formulas import KLController, RunningMoments
from hfllm.trainers.ppo.rollout import Batch, Rollout, length_groups, pad_prompts, with_actions
from hfllm.trainers.ppo.sampling import SampledLogprobs, generate_responses, most_cached_rows
from hfllm.trainers.ppo.setup import NO_VLLM, as_reference, load_weights
from hfllm.trainers.ppo.shared_base import AdapterScorer
from hfllm.trainers.ppo.vllm_sampling import VllmSampler

# ---- checkpoints ----
#
# The content of a PPO checkpoint besides Trainer's, its writing, and resuming a run from it.


VALUE_MODEL_FOLDER, REFERENCE_FOLDER = "value_model", "reference"
VALUE_HEAD_FILE, STATE_FILE = "value_head.safetensors", "ppo_state.json"


class ActorCriticCheckpoints(Trainer):
    """Trainer with checkpoints of everything needed for the next step of a policy and a critic.

    Policy, critic, a moving reference, the rollout in use, the metrics since the last log and the controllers, besides
    Trainer's own content: optimizer, schedule, random state.
    """

    reference: PreTrainedModel | None
    kl_controller: KLController
    reward_moments: RunningMoments
    _rollout: Rollout | None
    _metrics: dict[str, list[torch.Tensor]]
    _skipped_from: int | None
    _synced_at: int
    _trusted: dict[str, bool]

    @property
    def actor(self) -> ActorCritic:
        """Return the trained module, without the engine around it."""
        # Unwrapping looks for installed engines, and takes milliseconds.
        return self.model if isinstance(self.model, ActorCritic) else self.accelerator.unwrap_model(self.model)

    @property
    def policy(self) -> PreTrainedModel:
        """Return the trained policy."""
        return self.actor.policy

    # ---- saving ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        output = Path(output_dir or self.args.output_dir)
        actor = self.actor
        state = state_dict or actor.state_dict()

        def part(prefix: str) -> dict[str, torch.Tensor]:
            return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

        # Without the reference's adapter.
        trained = {"selected_adapters": [self.policy.active_adapter]} if hasattr(self.policy, "peft_config") else {}
        self.policy.save_pretrained(output, state_dict=part("policy."), **trained)
        if isinstance(actor.value_model, AdapterScorer):
            actor.value_model.save(output / VALUE_MODEL_FOLDER, state)
        elif actor.value_model is not None:
            actor.value_model.save_pretrained(output / VALUE_MODEL_FOLDER, state_dict=part("value_model."))
        else:
            save_file({"weight": part("value_head.")["weight"].contiguous()}, output / VALUE_HEAD_FILE)
        self.processing_class.save_pretrained(output)

    def _save_rng_state(self, output_dir: str) -> None:
        # Each process writes this part of a checkpoint for itself, so its rollout is saved here.
        super()._save_rng_state(output_dir)
        if self._rollout is not None:
            self._rollout.save(self._rollout_file(output_dir))
        if self._metrics:
            # The next log covers the steps since the last log.
            metrics = {name: torch.cat(values).contiguous() for name, values in self._metrics.items()}
            save_file(metrics, self._metrics_file(output_dir))
        if self.args.should_save:
            state = {
                "kl_controller": asdict(self.kl_controller),
                "reward_moments": asdict(self.reward_moments),
                "skipped_from": self._skipped_from,
                "synced_at": self._synced_at,
                "trusted": self._trusted,
            }
            (Path(output_dir) / STATE_FILE).write_text(json.dumps(state))
            if self.args.sync_ref_model:
                self.reference.save_pretrained(Path(output_dir) / REFERENCE_FOLDER)
        # The file marking the checkpoint as complete comes last.
        self.accelerator.wait_for_everyone()

    def _rollout_file(self, folder: str) -> Path:
        return Path(folder) / f"rollout_{self.args.process_index}.safetensors"

    def _metrics_file(self, folder: str) -> Path:
        return Path(folder) / f"metrics_{self.args.process_index}.safetensors"

    # ---- resuming ----

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load_actor(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Called for every engine, also for engines with their own loading of weights.
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_progress(Path(checkpoint))

    def _load_progress(self, folder: Path) -> None:
        """Load the rollout in use, the controllers and a moving reference."""
        saved = len(list(folder.glob("rollout_*.safetensors")))
        if saved and saved != self.args.world_size:
            raise InputError(f"{folder} was saved by {saved} processes; this run has {self.args.world_size}")
        if (file := self._rollout_file(str(folder))).is_file():
            self._rollout = Rollout.load(file, self.accelerator.device)
        if (file := self._metrics_file(str(folder))).is_file():
            for name, values in load_file(file, device=str(self.accelerator.device)).items():
                self._metrics[name] = [values]
        if (folder / STATE_FILE).is_file():
            state = json.loads((folder / STATE_FILE).read_text())
            self.kl_controller.coefficient = state["kl_controller"]["coefficient"]
            vars(self.reward_moments).update(state["reward_moments"])
            self._skipped_from, self._synced_at = state["skipped_from"], state["synced_at"]
            self._trusted = state["trusted"]
        if self.args.sync_ref_model:
            load_weights(self.reference, folder / REFERENCE_FOLDER)

    def _load_best_model(self) -> None:
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            super()._load_best_model()
            return
        self._load_actor(Path(self.state.best_model_checkpoint))

    def _load_actor(self, folder: Path) -> None:
        actor = self.actor
        if hasattr(self.policy, "peft_config"):
            from peft import set_peft_model_state_dict
            from peft.utils import load_peft_weights

            active = self.policy.active_adapter
            # PEFT saves an adapter named by the user in a folder of that name.
            weights = load_peft_weights(str(folder if active == "default" else folder / active), device="cpu")
            set_peft_model_state_dict(self.policy, weights, adapter_name=active)
        else:
            load_weights(self.policy, folder)
        if isinstance(actor.value_model, AdapterScorer):
            actor.value_model.load(folder / VALUE_MODEL_FOLDER)
        elif actor.value_model is not None:
            load_weights(actor.value_model, folder / VALUE_MODEL_FOLDER)
        else:
            actor.value_head.load_state_dict(load_file(folder / VALUE_HEAD_FILE))


# ---- base trainer ----


# Tokens per pass on a CPU, where larger passes save no time, and logits per pass with a large vocabulary: 16 MB.
MOST_CPU_TOKENS, LEAST_CPU_TOKENS, MOST_CPU_LOGITS = 768, 256, 2**22
# Tokens per pass, padding included, of models that do not compute the padding: one pass in place of several.
MOST_MIXED_TOKENS = 4096
# Rows and tokens of a pass in half precision on a CPU: each shape needs kernels of its own, so these are few.
HALF_ROWS, HALF_TOKENS = 16, 1536


class ActorCriticTrainer(ActorCriticCheckpoints):
    """Base class for trainers of a policy and a critic, without an algorithm."""

    sampling_config: GenerationConfig
    vllm: VllmSampler | None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create Trainer's optimizer, with separate groups for the critic if `value_learning_rate` is given."""
        if self.optimizer is not None or self.args.value_learning_rate is None:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        critic = {id(parameter) for parameter in self.actor.critic_parameters()}
        for group in list(optimizer.param_groups):
            own = [parameter for parameter in group["params"] if id(parameter) in critic]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in critic]
            if own:
                optimizer.add_param_group({**group, "params": own, "lr": self.args.value_learning_rate})
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: object) -> TrainOutput:
        """Train as `Trainer` does; `True` resumes from the newest complete checkpoint."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise InputError(f"resume_from_checkpoint=True: no complete checkpoint in {self.args.output_dir}")
        save_on_sigterm(self)
        self._begin()
        return train_unless_done(self, super().train, resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def evaluate(self, *args: object, **kwargs: object) -> dict[str, float]:
        """Evaluate as `Trainer` does; before training, ZeRO-3 has partitioned the policy but gathers nothing yet."""
        is_early = self.is_deepspeed_enabled and self.deepspeed is None
        self.eval_completions, self._is_evaluating = [], True
        try:
            with gather_parameters(self.actor) if is_early else nullcontext():
                return super().evaluate(*args, **kwargs)
        finally:
            self._is_evaluating = False

    def _check_engine(self) -> None:
        """Refuse FSDP, with which sampling is untested, and options in need of gradients hidden by DeepSpeed."""
        refuse_data_parallel(self.args)
        if self.accelerator.distributed_type == DistributedType.FSDP:
            raise InputError("PPOTrainer does not work with FSDP: shard by DeepSpeed ZeRO-2 or ZeRO-3, or use DDP")
        if self.accelerator.distributed_type != DistributedType.DEEPSPEED:
            return
        for name in ("critic_warmup_steps", "target_kl", "sync_ref_model", "shared_base"):
            if getattr(self.args, name):
                raise InputError(f"{name}={getattr(self.args, name)} does not work with DeepSpeed: leave it out")

    def _check_optimizer(self) -> None:
        """Refuse a caller's optimizer that would not train some weights, such as the new value head's."""
        if self.optimizer is None:
            return
        ids = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        missing = [name for name, each in self.actor.named_parameters() if each.requires_grad and id(each) not in ids]
        if missing:
            raise InputError(
                f"optimizers: {len(missing)} weights would not be trained, the first {missing[0]}: set "
                "trainer.optimizer = ...(trainer.model.parameters()) once the trainer is built, or choose one by optim"
            )
        if self.args.value_learning_rate is not None:
            raise InputError("optimizers: value_learning_rate has no effect on it; give the critic its own group")

    def _begin(self) -> None:
        """Reset the state after an earlier, interrupted call of `train`."""
        self._rollout, self._skipped_from, self._micro_step, self._synced_at = None, None, 0, 0
        # Whether log-probabilities kept during sampling can be trusted, with padded prompts and without, once checked.
        self._trusted: dict[str, bool] = {}
        # Of the episodes being sampled.
        self._recorder: SampledLogprobs | None = None
        self._sums: dict[str, torch.Tensor] = {}
        # Of the last evaluation: values per prompt and metric, and this process's prompts with their responses.
        self.eval_values: dict[str, list[float]] = {}
        self.eval_completions: list[dict[str, Any]] = []
        self._is_evaluating = False
        self._metrics: dict[str, list[torch.Tensor]] = defaultdict(list)
        # By reward functions, in each process other names if they like; by prefix.
        self._logged: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    # ---- forward passes ----

    def _passes(self, batch: Batch, most_rows: int | None = None) -> Iterator:
        """Yield groups of similar length. Engines that count or synchronize passes get each micro-batch whole.

        Args:
            most_rows: limit per group, of passes without gradients.
        """
        device, limit = self.accelerator.device, self.args.max_tokens_per_pass
        logits = most_logits(self.policy, device) if limit is None else None
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            if most_rows is not None and logits is not None:
                # By the longest possible response, since all processes must make as many passes.
                most_rows = min(most_rows, max(logits // self.args.response_length, 1))
            return length_groups(batch, None, most_rows=most_rows)
        is_cpu = device.type == "cpu"
        bucket = self.args.length_bucket_size
        if limit is None and is_cpu:
            within = max(MOST_CPU_LOGITS // self.policy.config.get_text_config().vocab_size, LEAST_CPU_TOKENS)
            limit = min(MOST_CPU_TOKENS, within)
            if bucket is None and self.actor.leaves_out_padding:
                return length_groups(batch, None, min(MOST_MIXED_TOKENS, within), most_rows)
            if bucket is None and self.accelerator.mixed_precision == "bf16":
                limit = min(HALF_TOKENS, 2 * within)
                return length_groups(batch, None, limit, min(most_rows or HALF_ROWS, HALF_ROWS), logits)
        elif limit is None and most_rows is not None:
            limit = most_tokens(self.policy, device)
        bucket = bucket or (8 if is_cpu else 256)
        return length_groups(batch, bucket, limit, most_rows, logits)

    def _witness(self, episodes: int) -> SampledLogprobs | None:
        """Return a recorder of the log-probabilities during sampling, if they are as exact as a second pass."""
        args, actor = self.args, self.actor
        is_exact = self.accelerator.mixed_precision == "no" and self.policy.dtype == torch.float32
        is_whole = self.accelerator.distributed_type != DistributedType.DEEPSPEED
        if not (is_exact and is_whole) or args.use_vllm or args.kl_estimator == "full":
            return None
        value_head = actor.value_head if actor.value_model is None else None
        shape = (episodes, args.response_length)
        return SampledLogprobs(shape, actor.temperature, actor.never_sampled, value_head, self.accelerator.device)

    def _own_view(
        self, chunk: Batch, rows: torch.Tensor, witness: SampledLogprobs | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return log-probabilities, entropies and values (B, R) of policy and critic, and a log-distribution (N, V).

        Recorded values are checked before use, since `generate` does not handle the padding of every model correctly,
        nor need a head read the states that a critic on the trunk reads.
        """
        mask = chunk["action_mask"] > 0
        if witness is not None:
            logprobs, entropy, values = (
                part[rows, : mask.shape[1]].masked_fill(~mask, 0.0)
                for part in (witness.logprobs, witness.entropy, witness.values)
            )
            if witness.is_checked or self._finds_again(chunk, logprobs, values):
                if self.actor.value_model is not None:
                    values = self.actor.estimate_values(**chunk)
                return logprobs, entropy, values, None
            witness.is_wrong = True
        logprobs, values, distribution = self.actor(**chunk, with_distribution=True)
        entropy = scatter_to_mask(entropy_of(distribution), mask)
        return logprobs, entropy, values, distribution if self.args.kl_estimator == "full" else None

    def _finds_again(self, chunk: Batch, logprobs: torch.Tensor, values: torch.Tensor) -> bool:
        """Return whether a second pass finds these log-probabilities, and the values (B, R) if a head gave them."""
        found, found_values, _ = self.actor(**chunk)
        if not torch.allclose(logprobs, found, atol=1e-3):
            return False
        # Of a critic that is a model of its own nothing was recorded.
        return self.actor.value_model is not None or torch.allclose(values, found_values, atol=1e-3, rtol=1e-3)

    def _believed(self, batch: dict[str, Any]) -> SampledLogprobs | None:
        """Return the batch's recorded values, unless earlier ones of the same kind were found wrong."""
        witness = batch.get("witness")
        is_trusted = self._trusted.get(self._kind_of(batch))
        if witness is None or is_trusted is False:
            return None
        witness.is_checked = bool(is_trusted)
        return witness

    def _remember(self, batch: dict[str, Any], witness: SampledLogprobs | None) -> None:
        if witness is not None:
            self._trusted[self._kind_of(batch)] = not witness.is_wrong

    @staticmethod
    def _kind_of(batch: dict[str, Any]) -> str:
        # The part before an episode's later turns is padded.
        has_turns = (batch["action_mask"] < batch["response_mask"]).any()
        kind = "padded" if bool(has_turns or (batch["prompt_mask"] == 0).any()) else "unpadded"
        return kind if batch.get("pictures") is None else f"{kind} with pictures"

    @torch.no_grad()
    def _reference(self, chunk: Batch, with_distribution: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return log-probabilities (B, R) of the responses under the reference, and its log-distributions (N, V)."""
        with nullcontext() if self.reference is not None else as_reference(self.policy):
            model = self.policy if self.reference is None else self.reference
            return self.actor.judge(model, **chunk, with_distribution=with_distribution)

    def _sync_reference(self) -> None:
        """Move the reference towards the policy if enough steps have passed since the last move."""
        args, step = self.args, self.state.global_step
        if (
            not args.sync_ref_model
            or step // args.ref_model_sync_steps == self._synced_at // args.ref_model_sync_steps
        ):
            return
        self._synced_at = step
        with torch.no_grad():
            for own, new in zip(self.reference.parameters(), self.policy.parameters(), strict=True):
                own.lerp_(new.to(own.dtype), args.ref_model_mixup_alpha)

    # ---- metrics ----

    def _sum_over_processes(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")

    def _add(self, share: torch.Tensor, **sums: torch.Tensor) -> None:
        for name, total in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + total.detach() * share

    def _drain_metrics(self, prefix: str) -> dict[str, float]:
        names = [name for name in self._metrics if name.startswith("eval_") == bool(prefix)]
        means = {}
        if prefix:
            values = {name.removeprefix(prefix): torch.cat(self._metrics[name]) for name in names}
            self.eval_values = {name: each.tolist() for name, each in values.items()}
        for name in names:
            parts, is_reward = self._metrics.pop(name), name.removeprefix("eval_").startswith("rewards/")
            # Not a number: a response that this reward does not judge.
            mean = self._mean_over_processes([each[~each.isnan()] for each in parts] if is_reward else parts)
            if not (is_reward and math.isnan(mean)):
                means[name] = mean
        return means

    def _mean_over_processes(self, parts: list[torch.Tensor]) -> float:
        values = torch.cat(parts)
        total, count = self._sum_over_processes(torch.stack((values.sum(), values.new_tensor(len(values)))))
        return (total / count).item()

    def _drain_logged(self, prefix: str) -> dict[str, float]:
        """Return the means of what reward functions have logged, over all processes."""
        own = [(f"{prefix}{name}", value) for name, values in self._logged.pop(prefix, {}).items() for value in values]
        every = gather_object(own) if self.accelerator.num_processes > 1 else own
        values: dict[str, list[float]] = {}
        for name, value in every:
            values.setdefault(name, []).append(value)
        return {name: math.fsum(each) / len(each) for name, each in values.items()}

    def _keep_completions(self, name: str) -> None:
        """Write the last completions as parquet, one file per process; log the ones of the first process."""
        if self._is_evaluating:
            self.eval_completions += self.completions
        if not self.args.log_completions:
            return
        from datasets import Dataset

        folder = Path(self.args.output_dir) / "completions"
        folder.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(storable(self.completions)).to_parquet(folder / f"{name}_{self.args.process_index}.parquet")
        if self.is_world_process_zero():
            # An evaluation has one table per batch.
            parts = name.split("_")
            table = f"{parts[0]}_completions_{parts[-1]}" if name.startswith("eval") else "completions"
            log_table(self.callback_handler.callbacks, table, self.completions, self.state.global_step)

    def _check_finite(self, loss: torch.Tensor, inputs: Batch) -> None:
        if bool(loss.isfinite()):
            return
        file = self._not_finite_file()
        tensors = {name: value.contiguous() for name, value in inputs.items() if torch.is_tensor(value)}
        save_file(tensors | (inputs["pictures"].tensors() if inputs.get("pictures") is not None else {}), file)
        raise FloatingPointError(f"the loss is {loss.item()} at step {self.state.global_step}; its batch is in {file}")

    @contextmanager
    def _sampling_from(self, **prompts: torch.Tensor) -> Iterator[None]:
        """Gather the policy for sampling; non-finite logits stop the run, and the prompts are saved."""
        try:
            with gather_parameters(self.policy), self.accelerator.autocast():
                yield
        except FloatingPointError as error:
            file = self._not_finite_file()
            save_file({name: value.contiguous() for name, value in prompts.items()}, file)
            step = self.state.global_step
            raise FloatingPointError(f"{error} at step {step}; the prompts are in {file}") from error

    def _responses(
        self,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        witness: SampledLogprobs | None,
        max_new_tokens: int | None = None,
        pictures: Pictures | None = None,
    ) -> dict[str, torch.Tensor]:
        """Sample by `generate`, as many rows at a time as their keys and values have room for."""
        config = self.sampling_config
        if max_new_tokens is not None:
            config = copy(config)
            config.max_new_tokens = max_new_tokens
        length = prompt_ids.shape[1] + config.max_new_tokens
        most_rows = most_cached_rows(self.policy, length, self.accelerator.device)
        inputs = (self.policy, prompt_ids, prompt_mask, config, tokenizer_of(self.processing_class), witness)
        with self._sampling_from(prompt_ids=prompt_ids, prompt_mask=prompt_mask):
            return generate_responses(*inputs, most_rows=most_rows, pictures=pictures)

    @torch.no_grad()
    def continue_ids(
        self,
        sequences: Sequence[Sequence[int]],
        max_new_tokens: int,
        images: "Sequence[Sequence[ImageTensors]] | None" = None,
    ) -> list[tuple[list[int], bool]]:
        """Sample from the policy the continuation of each sequence of token ids, with the trainer's sampling settings.

        Under ZeRO-3 every process has to call this equally often.

        Args:
            images: the images of each sequence, see `Episode`.

        Returns:
            For each the new tokens, with the end token where one was sampled, and whether they came to an end.
        """
        refuse_if(images is not None and self.vllm is not None, NO_VLLM)
        if self.vllm is not None:
            sampled = self.vllm(sequences, self.state.global_step, self.accelerator.device, max_new_tokens)
        else:
            ids, mask = pad_prompts(sequences, self.sampling_config.pad_token_id, self.accelerator.device)
            witness = self._recorder
            if witness is not None and witness.turns != len(sequences):
                witness = None
            sampled = self._responses(ids, mask, witness, max_new_tokens, Pictures.of_episodes(images or []))
        lengths = sampled["response_mask"].sum(1).tolist()
        turns = [row[:length] for row, length in zip(sampled["response_ids"].tolist(), lengths, strict=True)]
        return list(zip(turns, sampled["is_ended"].tolist(), strict=True))

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | None = None) -> torch.Tensor | float:
        norm = super()._get_grad_norm(model, grad_norm)
        # The loss scaling of fp16 expects such gradients now and then, and skips their step.
        if self.accelerator.scaler is not None or math.isfinite(norm) or self._rollout is None:
            return norm
        file = self._not_finite_file()
        self._rollout.save(file)
        step = self.state.global_step
        raise FloatingPointError(f"the norm of the gradient is {float(norm)} at step {step}; its rollout is in {file}")

    def _not_finite_file(self) -> Path:
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"not_finite_{self.state.global_step}_{self.args.process_index}.safetensors"

    # ---- evaluation ----

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
        # The same random numbers every time, without changing training's random state.
        with forked_random(self.accelerator.device):
            torch.manual_seed(self.args.seed + self.args.process_index)
            for rows in dataloader:
                batch = with_actions(self.sample(rows))
                self.score(rows, batch, prefix)
                tokens = self.evaluate_tokens(batch)
                self._log_rollout(tokens, batch["action_mask"].to(tokens.logprobs.dtype), prefix)
                self._keep_completions(f"{metric_key_prefix}_{self.state.global_step:06d}_{count:06d}")
                for name, parts in self._metrics.items():
                    if name.startswith(prefix):
                        # Without the padding rows in the last batch of some processes.
                        parts[-1] = self.accelerator.gather_for_metrics(parts[-1])
                count += len(rows)
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        metrics = {
            name.replace(prefix, f"{metric_key_prefix}_", 1): value
            for name, value in {**self._drain_logged(prefix), **self._drain_metrics(prefix)}.items()
        }
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=count)
