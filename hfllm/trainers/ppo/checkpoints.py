"""What a checkpoint of PPO holds besides what Trainer saves, how it is written, and how a run resumes from it."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, Trainer

from hfllm.errors import InputError
from hfllm.trainers.ppo.actor_critic import ActorCritic
from hfllm.trainers.ppo.controllers import KLController, RunningMoments
from hfllm.trainers.ppo.rollout import Rollout
from hfllm.trainers.ppo.setup import load_weights

VALUE_MODEL_FOLDER, REFERENCE_FOLDER = "value_model", "reference"
VALUE_HEAD_FILE, STATE_FILE = "value_head.safetensors", "ppo_state.json"


class ActorCriticCheckpoints(Trainer):
    """Trainer whose checkpoints hold all that the next step of a policy and a critic depends on.

    Policy, critic, a moving reference, the rollout in use, the metrics since the last log and the controllers, besides
    what Trainer saves: optimizer, schedule, random state.
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
        """Return the trained module, without the engine that wraps it."""
        # Unwrapping looks for engines that are installed, which takes milliseconds.
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

        # Without the adapter that the reference keeps.
        trained = {"selected_adapters": [self.policy.active_adapter]} if hasattr(self.policy, "peft_config") else {}
        self.policy.save_pretrained(output, state_dict=part("policy."), **trained)
        if actor.value_model is not None:
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
            # What is logged next covers the steps since the last log.
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
        # The file that marks the checkpoint as complete comes last.
        self.accelerator.wait_for_everyone()

    def _rollout_file(self, folder: str) -> Path:
        return Path(folder) / f"rollout_{self.args.process_index}.safetensors"

    def _metrics_file(self, folder: str) -> Path:
        return Path(folder) / f"metrics_{self.args.process_index}.safetensors"

    # ---- resuming ----

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load_actor(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Called for every engine, also for engines that load the weights themselves.
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
            # PEFT saves one that its user has named in a folder of that name.
            weights = load_peft_weights(str(folder if active == "default" else folder / active), device="cpu")
            set_peft_model_state_dict(self.policy, weights, adapter_name=active)
        else:
            load_weights(self.policy, folder)
        if actor.value_model is not None:
            load_weights(actor.value_model, folder / VALUE_MODEL_FOLDER)
        else:
            actor.value_head.load_state_dict(load_file(folder / VALUE_HEAD_FILE))
