"""What makes logits, losses and generated text of a decoder's states, in models of text and in models that see.

This file imports only torch, transformers and files beside it, and is uploaded to the Hub with modeling_hfllm.py.
Shapes: B batch, S sequence, E hidden_size.
"""

from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.utils import ModelOutput

from .attention_hfllm import keep_last_sequences, rotation_changes
from .balance_hfllm import balance_loss, check_gradients, install_capturing_hooks
from .configuration_hfllm import HfllmConfig
from .latent_hfllm import refuse_paging
from .loss_hfllm import linear_cross_entropy

if TYPE_CHECKING:
    # At run time it would be a second base of the classes that mix this one in.
    _Base = GenerationMixin
else:
    _Base = object


def logits_of(config: HfllmConfig, head: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Return the head's scores of states (..., E), scaled and limited as the config says."""
    logits = head(hidden_states)
    logits = logits if config.logit_scale == 1 else logits * config.logit_scale
    softcap = config.final_logit_softcapping
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class CausalHead(_Base):
    """Logits, losses and generation of a model whose decoder is an `HfllmModel`.

    The class that mixes it in has `model`, which returns the decoder's states, and `lm_head`. Where the decoder is a
    part of `model`, it overrides the two properties.
    """

    @property
    def _decoder(self) -> PreTrainedModel:
        """The decoder."""
        return self.model

    @property
    def _decoder_config(self) -> HfllmConfig:
        """The decoder's config."""
        return self.config

    def _output(self, outputs: ModelOutput, **fields: object) -> ModelOutput:
        """Return what `forward` returns, of what `model` returned and the fields of a language model's output."""
        return MoeCausalLMOutputWithPast(**fields)

    def _run(
        self,
        inputs: dict[str, Any],
        labels: torch.LongTensor | None,
        output_router_logits: bool | None,
        logits_to_keep: int | torch.Tensor,
        loss_chunk_size: int | None,
        **kwargs: object,
    ) -> ModelOutput:
        """Return logits and losses: see `HfllmForCausalLM.forward`.

        Args:
            inputs: what `model` reads, and nothing of the losses.
        """
        config = self._decoder_config
        # Not in the signature, where Trainer would take it for a label column because of its name.
        label_smoothing = kwargs.pop("label_smoothing", 0.0)
        is_balanced = self.training and labels is not None and config.router_aux_loss_coef > 0
        asked = config.output_router_logits if output_router_logits is None else output_router_logits
        output_router_logits = bool(config.num_local_experts) and (asked or is_balanced)
        if output_router_logits:
            install_capturing_hooks(self._decoder)
        if config.num_local_experts:
            kwargs["output_router_logits"] = output_router_logits
        outputs = self.model(**inputs, **kwargs)
        # Trainer's evaluation gives the logits to `compute_metrics`; a call that asks for chunks itself wants none.
        is_evaluation = loss_chunk_size is None and not self.training and not torch.is_grad_enabled()
        loss_chunk_size = config.loss_chunk_size if loss_chunk_size is None else loss_chunk_size
        states, logits, loss, aux_loss = outputs.last_hidden_state, None, None, None
        if labels is None or not loss_chunk_size or is_evaluation:
            logits = logits_of(config, self.lm_head, slice_logits_to_keep(states, logits_to_keep))
        if labels is not None:
            whole = None if loss_chunk_size else logits
            loss = self._loss(states, whole, labels, loss_chunk_size, label_smoothing, **kwargs)
        if output_router_logits:
            aux_loss = balance_loss(config, outputs.router_logits, inputs.get("attention_mask"))
            if is_balanced:
                check_gradients(self._decoder.layers, outputs.router_logits, states)
            if loss is not None:
                loss = loss + config.router_aux_loss_coef * aux_loss.to(loss.device)
        return self._output(
            outputs,
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
        )

    def _loss(self, hidden_states, logits, labels, chunk_size, label_smoothing, **kwargs) -> torch.Tensor:
        config = self._decoder_config
        if logits is not None and not label_smoothing:
            return self.loss_function(logits=logits, labels=labels, vocab_size=config.vocab_size, **kwargs)
        targets, num_items = kwargs.get("shift_labels"), kwargs.get("num_items_in_batch")
        ignored = kwargs.get("ignore_index", -100)
        if targets is None:
            targets = nn.functional.pad(labels[..., 1:], (0, 1), value=ignored)
        targets = targets.reshape(-1).to(hidden_states.device)
        states = hidden_states.flatten(0, 1) * config.logit_scale
        chunk_size = chunk_size or len(targets)
        softcap = config.final_logit_softcapping
        total = linear_cross_entropy(states, self.lm_head, targets, chunk_size, label_smoothing, ignored, softcap)
        return total / ((targets != ignored).sum() if num_items is None else num_items)

    @wraps(GenerationMixin.generate)
    def generate(self, inputs: torch.Tensor | None = None, *args, **kwargs) -> ModelOutput | torch.LongTensor:
        return super().generate(inputs, *args, **keep_last_sequences(inputs, kwargs))

    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, input_ids: torch.LongTensor, *args, **kwargs) -> dict:
        kwargs = self._with_one_rotation(input_ids, kwargs)
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if inputs.get("position_ids") is not None:
            # Here, outside of a forward that may be compiled.
            mask = kwargs.get("attention_mask")
            length = max(input_ids.shape[1], mask.shape[-1] if isinstance(mask, torch.Tensor) else 0)
            self._decoder.check_context(length, inputs["position_ids"])
        return inputs

    def _with_one_rotation(self, input_ids: torch.LongTensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments that read all tokens again where `longrope` changes its factors, as in Phi-3.

        The cache is emptied for that.

        Raises:
            ValueError: when the tokens in the cache are not known.
        """
        cache, embeds = kwargs.get("cache"), kwargs.get("inputs_embeds")
        prompt = embeds if kwargs.get("is_first_iteration") and embeds is not None else input_ids
        new = kwargs.get("next_sequence_length") or prompt.shape[1]
        if not rotation_changes(self._decoder_config, cache, kwargs.get("position_ids"), new):
            return kwargs
        length = int(cache.get_seq_length()) + new
        kwargs = {**kwargs, "next_sequence_length": None, "is_first_iteration": True}
        if embeds is not None and 0 <= (later := length - embeds.shape[1]) <= input_ids.shape[1]:
            # Generated tokens follow a prompt that was given as embeddings.
            generated = self.get_input_embeddings()(input_ids[:, input_ids.shape[1] - later :])
            kwargs["inputs_embeds"] = torch.cat((embeds, generated.to(embeds)), dim=1)
        elif input_ids.shape[1] < length:
            raise ValueError(
                f"rope_type='longrope' has other factors for {length} tokens than for those in the cache, which are "
                "not known here: give all input_ids, and no prefill_chunk_size"
            )
        cache.reset()
        return kwargs

    @wraps(GenerationMixin.init_continuous_batching)
    def init_continuous_batching(self, *args, **kwargs) -> object:
        refuse_paging(self._decoder_config)
        return super().init_continuous_batching(*args, **kwargs)
