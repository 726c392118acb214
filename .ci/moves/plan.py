# ruff: noqa
"""The moves of the first step of the house by subject, a step at a time: STEP=scaling python .ci/moves/move.py REPO THIS.

`moves` and `splits` are the list of the plan, `M` and `S` what they became; temporary, removed with the last of the moves.
"""

import ast
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from docs import DOCS

moves = {
    "compression/int8.py": ["compression/affine.py", "compression/dynamic_int8.py"],
    "compression/schemes.py": ["compression/schemes.py", "compression/measure.py"],
    "data/augmentation.py": ["data/augmentation.py", "data/perturbations.py"],
    "data/conversations.py": ["data/conversations.py", "data/read_back.py"],
    "data/curation/duplicates.py": ["data/curation/dedup.py", "data/curation/decontamination.py"],
    "data/curation/filters.py": ["data/curation/quality.py", "data/curation/content.py", "data/curation/spam.py"],
    "data/curation/inputs.py": [
        "data/curation/inputs.py",
        "data/curation/files.py",
        "data/curation/reader.py",
        "data/curation/warc.py",
    ],
    "data/curation/options.py": ["data/curation/options.py", "data/curation/examples.py"],
    "data/curation/perplexity.py": ["data/curation/perplexity.py", "data/curation/ngram_model.py"],
    "data/curation/pipeline.py": ["data/curation/pipeline.py"],
    "data/curation/text.py": ["data/curation/text.py", "data/curation/html_text.py", "data/curation/html_tokens.py"],
    "data/formats.py": ["data/formats.py"],
    "data/images/files.py": ["data/image_files.py"],
    "data/images/rows.py": [
        "data/images.py",
        "stages/own_pictures.py",
        "data/picture_batches.py",
        "data/named_pictures.py",
    ],
    "data/labelled.py": ["data/labelled.py", "data/labelled_tokens.py"],
    "data/loading.py": ["data/loading.py", "data/mixtures.py"],
    "data/packing.py": ["data/packing.py", "data/padding.py", "data/objectives.py", "data/long_texts.py"],
    "data/rows.py": ["data/rows.py", "data/messages.py"],
    "data/sources.py": ["data/sources.py", "data/pydoc_corpus.py", "data/hub_pictures.py"],
    "data/tokenizer.py": [
        "data/tokenizer.py",
        "data/chat_templates.py",
        "data/plain_text.py",
        "data/added_texts.py",
        "data/transcripts.py",
    ],
    "data/world/demonstrators.py": ["data/world/demonstrators.py", "data/world/critics.py"],
    "data/world/documents.py": [
        "data/world/documents.py",
        "data/world/tool_documents.py",
        "data/world/reasoning_documents.py",
        "data/world/passage_documents.py",
        "data/world/passages.py",
        "data/world/passage_tasks.py",
    ],
    "data/world/pictures.py": ["data/world/pictures.py", "data/picture_rows.py"],
    "data/world/reasoning.py": ["data/world/reasoning.py", "data/world/thought_checks.py"],
    "data/world/tasks.py": [
        "data/world/tool_tasks.py",
        "data/world/long_documents.py",
        "data/world/labelled.py",
        "data/world/rewording.py",
    ],
    "data/world/vocabulary.py": ["data/world/vocabulary.py", "data/world/rubric.py"],
    "data/world/world.py": ["data/world/world.py"],
    "environments/episodes.py": [
        "environments/episodes.py",
        "environments/tool_turns.py",
        "environments/tool_environment.py",
        "environments/stateful.py",
    ],
    "environments/python_tool.py": ["environments/python_tool.py"],
    "environments/tools.py": ["environments/tools.py", "environments/built_in.py", "environments/retrieval.py"],
    "evaluation/alignment.py": ["evaluation/alignment.py", "evaluation/best_of_n.py"],
    "evaluation/before_after.py": [
        "evaluation/fine_tuning.py",
        "evaluation/quantization.py",
        "evaluation/picture_quantization.py",
        "evaluation/distillation.py",
    ],
    "evaluation/classification.py": ["evaluation/classification.py", "evaluation/bag_of_words.py"],
    "evaluation/emergence.py": ["evaluation/emergence.py", "evaluation/few_shot.py"],
    "evaluation/interpreting/hooks.py": ["evaluation/interpreting/hooks.py", "evaluation/interpreting/prompts.py"],
    "evaluation/interpreting/material.py": [
        "evaluation/interpreting/material.py",
        "evaluation/interpreting/encoding.py",
    ],
    "evaluation/interpreting/measures.py": [
        "evaluation/interpreting/patching.py",
        "evaluation/interpreting/attribution.py",
        "evaluation/interpreting/probes.py",
        "evaluation/interpreting/logit_lens.py",
        "evaluation/interpreting/attention.py",
    ],
    "evaluation/interpreting/methods.py": ["evaluation/interpreting/methods.py"],
    "evaluation/interpreting/planted.py": [
        "evaluation/interpreting/planted.py",
        "evaluation/interpreting/controls.py",
        "evaluation/interpreting/locating.py",
        "evaluation/interpreting/testing.py",
    ],
    "evaluation/judged.py": ["evaluation/responses.py"],
    "evaluation/long_texts.py": ["evaluation/needle.py", "evaluation/segments.py"],
    "evaluation/pictures.py": ["evaluation/pictures.py", "evaluation/suites/pictures.py"],
    "evaluation/suites/base.py": [
        "evaluation/suites/base.py",
        "evaluation/suites/files.py",
        "evaluation/suites/choices.py",
        "evaluation/suites/judging.py",
        "evaluation/suites/subjects.py",
        "evaluation/suites/overlap.py",
    ],
    "evaluation/suites/interpretability.py": [
        "evaluation/suites/interpretability.py",
        "evaluation/suites/interpretability_report.py",
    ],
    "evaluation/suites/lm_eval.py": ["evaluation/suites/lm_eval.py", "evaluation/suites/lm_eval_files.py"],
    "evaluation/suites/refusals.py": ["evaluation/suites/refusals_suite.py", "evaluation/refusals.py"],
    "evaluation/suites/robustness.py": [
        "evaluation/suites/robustness.py",
        "evaluation/suites/robustness_items.py",
        "evaluation/suites/gradient_attack.py",
    ],
    "evaluation/suites/world_suites.py": ["evaluation/suites/world_suites.py"],
    "federation/lora.py": ["federation/lora.py"],
    "federation/organisations.py": ["federation/organisations.py"],
    "federation/privacy.py": [
        "federation/privacy.py",
        "federation/row_privacy.py",
        "federation/accountant.py",
        "federation/membership.py",
    ],
    "federation/rounds.py": ["federation/rounds.py", "federation/averaging.py", "federation/server_optimizers.py"],
    "federation/transports.py": ["federation/transports.py", "federation/processes.py"],
    "federation/updates.py": ["federation/updates.py", "federation/wire.py", "federation/compression.py"],
    "generation/caches.py": ["generation/caches.py", "generation/sinks.py", "generation/memory.py"],
    "generation/packed/model.py": [
        "generation/packed/model.py",
        "generation/packed/layer.py",
        "generation/packed/projections.py",
        "generation/packed/ragged_cache.py",
        "generation/packed/ragged_model.py",
    ],
    "generation/responses.py": ["generation/responses.py", "generation/voting.py", "generation/fast.py"],
    "generation/scoring.py": [
        "evaluation/suites/likelihood.py",
        "grounding/scoring.py",
        "rewards/passes.py",
        "evaluation/positions.py",
    ],
    "generation/spans.py": ["generation/spans.py", "evaluation/spans.py"],
    "generation/speculative/acceptance.py": [
        "generation/speculative/acceptance.py",
        "generation/speculative/options.py",
    ],
    "generation/speculative/drafts.py": ["generation/speculative/drafts.py", "generation/speculative/draft_length.py"],
    "generation/speculative/speculative.py": ["generation/speculative/speculative.py"],
    "grounding/abstention.py": ["grounding/abstention.py", "grounding/conformal.py"],
    "grounding/answers.py": [
        "grounding/answers.py",
        "grounding/prompts.py",
        "grounding/marginal.py",
        "grounding/instructions.py",
    ],
    "grounding/passages.py": ["grounding/passages.py", "grounding/chunking.py"],
    "grounding/retrieval.py": [
        "grounding/retrieval.py",
        "grounding/found.py",
        "grounding/dense.py",
        "grounding/encoders.py",
    ],
    "grounding/uncertainty.py": [
        "grounding/uncertainty.py",
        "grounding/samples.py",
        "grounding/meanings.py",
        "grounding/asking.py",
    ],
    "grounding/verification.py": ["grounding/verification.py", "grounding/entailment.py", "grounding/choosing.py"],
    "models/conversion/convert.py": [
        "models/conversion_hfllm.py",
        "models/native_families.py",
        "models/vision_conversion.py",
    ],
    "models/conversion/families.py": [
        "models/family_rows.py",
        "models/more_family_rows.py",
        "models/mixed_family_rows.py",
        "models/expert_family_rows.py",
        "models/latent_family_rows.py",
        "models/native_family.py",
        "models/unsupported_families.py",
    ],
    "models/conversion/tensor_layouts.py": ["models/tensor_layouts.py"],
    "models/devices.py": ["models/devices.py"],
    "models/extension.py": ["models/extension.py"],
    "models/family/attention_hfllm.py": ["models/attention_hfllm.py", "models/latent_hfllm.py"],
    "models/family/attention_masks_hfllm.py": [
        "models/banded_hfllm.py",
        "models/chunked_hfllm.py",
        "models/sparse_hfllm.py",
        "models/sparse_blocks_hfllm.py",
    ],
    "models/family/configuration_hfllm.py": [
        "models/configuration_hfllm.py",
        "models/expert_fields_hfllm.py",
        "models/latent_fields_hfllm.py",
        "models/layer_types_hfllm.py",
        "models/configuration_hfllm_vision.py",
    ],
    "models/family/experts_hfllm.py": ["models/experts_hfllm.py", "models/router_hfllm.py", "models/balance_hfllm.py"],
    "models/family/layers_hfllm.py": ["models/layers_hfllm.py", "models/memory_hfllm.py"],
    "models/family/linear_attention_hfllm.py": [
        "models/linear_hfllm.py",
        "models/delta_rule_hfllm.py",
        "models/delta_chunks_hfllm.py",
    ],
    "models/family/modeling_hfllm.py": ["models/modeling_hfllm.py", "models/head_hfllm.py", "models/loss_hfllm.py"],
    "models/family/modeling_hfllm_vision.py": ["models/modeling_hfllm_vision.py"],
    "models/family/presets.py": ["models/presets.py"],
    "models/loading/adapters.py": ["models/adapters.py", "models/merging.py", "models/scorers.py"],
    "models/loading/saved.py": [
        "models/loading.py",
        "models/stored.py",
        "models/context.py",
        "models/generation_settings.py",
        "models/vocabulary.py",
        "models/precision.py",
    ],
    "models/loading/weights.py": [
        "models/weights.py",
        "models/whole_folders.py",
        "models/fingerprint.py",
        "models/outputs_compared.py",
    ],
    "multimodal/answers.py": ["generation/picture_answers.py"],
    "multimodal/composed.py": ["multimodal/composed.py"],
    "multimodal/processors.py": [
        "multimodal/processors.py",
        "trainers/ppo/picture_tokens.py",
        "trainers/ppo/pictures.py",
    ],
    "outputs/card.py": [
        "outputs/card.py",
        "outputs/parents.py",
        "outputs/python_lines.py",
        "outputs/names.py",
        "outputs/labels.py",
        "outputs/merged.py",
    ],
    "outputs/checkpoints.py": ["outputs/checkpoints.py", "outputs/checksums.py", "trainers/checksums.py"],
    "outputs/hub.py": ["outputs/hub.py", "outputs/ownership.py"],
    "outputs/pictures.py": ["outputs/picture_grid.py", "outputs/picture_lines.py"],
    "outputs/report.py": ["outputs/report.py", "outputs/figures.py", "outputs/flags.py"],
    "outputs/statistics.py": ["outputs/calibration.py", "evaluation/intervals.py"],
    "rewards/functions.py": ["rewards/functions.py", "rewards/outcomes.py", "rewards/reasoning.py"],
    "rewards/judges.py": ["rewards/judges.py", "rewards/judge_labels.py", "rewards/judge_questions.py"],
    "rewards/models.py": ["rewards/models.py", "rewards/ensembles.py"],
    "runs/arguments.py": ["runs/arguments.py"],
    "runs/command_line.py": ["runs/parser.py", "runs/command_line.py", "runs/remote_code.py"],
    "runs/flags.py": ["runs/ranges.py", "runs/libraries.py", "runs/json_flags.py"],
    "runs/launcher.py": ["runs/launcher.py", "runs/accelerate_flags.py"],
    "runs/models.py": ["runs/models.py", "runs/adapters.py"],
    "runs/output.py": ["runs/quiet.py", "runs/failures.py"],
    "runs/pipeline.py": ["runs/chain.py", "stages/course.py"],
    "runs/recipes.py": ["runs/recipes.py"],
    "runs/schedule.py": ["runs/schedule.py"],
    "runs/stage.py": ["runs/stage.py", "runs/resuming.py", "runs/identity.py", "runs/lock.py"],
    "scaling/devices.py": ["scaling/devices.py"],
    "scaling/fitting.py": ["scaling/fitting.py", "scaling/minimize.py", "scaling/outliers.py", "scaling/runs.py"],
    "scaling/laws.py": ["scaling/laws.py"],
    "scaling/layouts.py": ["scaling/layouts.py", "scaling/stages.py"],
    "scaling/memory.py": ["scaling/memory.py", "scaling/activations.py"],
    "scaling/planner.py": ["scaling/planner.py", "scaling/advice.py", "scaling/requests.py"],
    "scaling/reports.py": ["scaling/report.py", "scaling/plan_report.py", "scaling/configs.py"],
    "scaling/shapes.py": [
        "scaling/shapes.py",
        "scaling/shape_checks.py",
        "scaling/shape_tables.py",
        "scaling/mixed_layers.py",
        "scaling/towers.py",
    ],
    "scaling/speed.py": ["scaling/speed.py", "scaling/flops.py", "scaling/links.py"],
    "scaling/studies.py": ["scaling/isoflop.py", "scaling/forecast.py"],
    "stages/classify.py": ["stages/classify.py", "stages/classify_data.py", "stages/classify_evaluation.py"],
    "stages/constitution/build.py": [
        "stages/constitution_data.py",
        "stages/constitution_runs.py",
        "stages/constitution_steps.py",
        "stages/constitution_checks.py",
        "stages/constitution_evaluation.py",
    ],
    "stages/constitution/flags.py": ["stages/constitution.py"],
    "stages/constitution/report.py": ["evaluation/constitution.py", "evaluation/constitution_report.py"],
    "stages/convert.py": ["stages/convert.py", "stages/merge.py", "stages/push.py", "stages/tokenizer.py"],
    "stages/curate.py": ["stages/curate.py"],
    "stages/distill.py": ["stages/distill.py", "stages/distill_trainers.py"],
    "stages/evaluate/build.py": [
        "stages/evaluate_suites.py",
        "stages/evaluate_pictures.py",
        "stages/evaluate_samples.py",
        "stages/evaluate_report.py",
        "stages/evaluate_checks.py",
    ],
    "stages/evaluate/flags.py": ["stages/evaluate.py", "stages/evaluate_lm_eval.py"],
    "stages/expert_iteration.py": [
        "stages/expert_iteration.py",
        "stages/expert_iteration_checks.py",
        "stages/expert_iteration_data.py",
        "stages/expert_iteration_evaluation.py",
    ],
    "stages/extend.py": [
        "stages/extend.py",
        "stages/extend_data.py",
        "stages/extend_evaluation.py",
        "stages/extend_trainer.py",
    ],
    "stages/federated/build.py": [
        "stages/federated_data.py",
        "stages/federated_pairs.py",
        "stages/federated_learner.py",
        "stages/federated_clients.py",
        "stages/federated_server.py",
        "stages/federated_flower.py",
    ],
    "stages/federated/flags.py": ["stages/federated.py"],
    "stages/federated/report.py": ["stages/federated_evaluation.py", "stages/federated_report.py"],
    "stages/ground.py": [
        "stages/ground.py",
        "stages/ground_data.py",
        "stages/ground_evaluation.py",
        "stages/ground_confidence.py",
        "stages/ground_verification.py",
        "evaluation/grounding.py",
        "evaluation/grounding_report.py",
    ],
    "stages/pretrain/build.py": [
        "stages/pretrain_data.py",
        "stages/pretrain_models.py",
        "stages/pretrain_trainers.py",
        "stages/pretrain_watch.py",
    ],
    "stages/pretrain/flags.py": ["stages/pretrain.py", "stages/architecture.py"],
    "stages/quantize.py": ["stages/quantize.py", "stages/quantize_pictures.py"],
    "stages/reason.py": [
        "stages/reason.py",
        "stages/reason_data.py",
        "stages/reason_evaluation.py",
        "evaluation/reasoning.py",
        "evaluation/reasoning_report.py",
    ],
    "stages/reward.py": ["stages/reward.py", "stages/reward_pictures.py"],
    "stages/rlhf/build.py": ["stages/rlhf.py", "stages/rlhf_tools.py", "stages/rlhf_checks.py"],
    "stages/scaling_laws.py": ["stages/scaling_laws.py", "stages/scaling_grid.py"],
    "stages/sft/build.py": ["stages/sft.py", "stages/sft_pictures.py", "stages/sft_retrieval.py"],
    "stages/shared.py": ["stages/picture_checks.py", "stages/user_rows.py", "stages/rlhf_pictures.py"],
    "stages/speculative.py": ["stages/speculative.py"],
    "stages/tools.py": [
        "stages/tools.py",
        "stages/tools_data.py",
        "stages/tools_runs.py",
        "stages/tools_steps.py",
        "stages/tools_evaluation.py",
        "evaluation/tools.py",
        "evaluation/tools_report.py",
    ],
    "stages/vision/build.py": ["stages/vision_data.py", "stages/vision_models.py", "stages/vision_ppo.py"],
    "stages/vision/flags.py": ["stages/vision.py"],
    "stages/vision/report.py": ["stages/vision_evaluation.py"],
    "synthesis/answers.py": ["synthesis/comparisons.py", "synthesis/teacher_answers.py", "synthesis/prompt_mixing.py"],
    "synthesis/constitution.py": [
        "synthesis/constitution.py",
        "synthesis/constitution_files.py",
        "synthesis/critiques.py",
    ],
    "synthesis/revisions.py": [
        "synthesis/reviser.py",
        "synthesis/revisions.py",
        "synthesis/revision_files.py",
        "synthesis/speakers.py",
    ],
    "trainers/callbacks.py": [
        "trainers/callbacks.py",
        "trainers/monitors.py",
        "trainers/run_record.py",
        "trainers/samples.py",
        "trainers/tables.py",
        "trainers/stalled_weights.py",
        "trainers/ppo/stalled_policy.py",
    ],
    "trainers/distillation/data.py": [
        "trainers/distillation/data.py",
        "trainers/distillation/teacher_cache.py",
        "trainers/distillation/teacher_memory.py",
    ],
    "trainers/distillation/trainer.py": [
        "trainers/distillation/trainer.py",
        "trainers/distillation/config.py",
        "trainers/distillation/options.py",
    ],
    "trainers/ppo/base_trainer.py": ["trainers/ppo/base_trainer.py", "trainers/ppo/checkpoints.py"],
    "trainers/ppo/config.py": ["trainers/ppo/config.py", "trainers/ppo/options.py", "trainers/ppo/default_rates.py"],
    "trainers/ppo/episodes.py": ["trainers/ppo/episodes.py"],
    "trainers/ppo/formulas.py": ["trainers/ppo/formulas.py", "trainers/ppo/controllers.py"],
    "trainers/ppo/prompts.py": ["trainers/ppo/prompts.py", "trainers/ppo/ptx.py"],
    "trainers/ppo/rollout.py": ["trainers/ppo/rollout.py"],
    "trainers/ppo/sampling.py": ["trainers/ppo/sampling.py", "trainers/ppo/turn_caches.py"],
    "trainers/ppo/scoring.py": ["trainers/ppo/scoring.py", "trainers/ppo/completions.py"],
    "trainers/ppo/setup.py": ["trainers/ppo/setup.py"],
    "trainers/ppo/trainer.py": ["trainers/ppo/trainer.py"],
    "trainers/ppo/vllm_sampling.py": ["trainers/ppo/vllm_sampling.py"],
    "trainers/pretraining/trainer.py": ["trainers/pretraining/trainer.py", "trainers/pretraining/batch_plan.py"],
    "trainers/shared.py": [
        "trainers/dropout.py",
        "trainers/sharding.py",
        "trainers/learning_rate.py",
        "trainers/interruptions.py",
        "trainers/exact_evaluation.py",
    ],
    "trainers/trl_trainers.py": ["trainers/trl_trainers.py", "trainers/heads.py", "trainers/pictures.py"],
}
splits = {
    "data/loading.py": {"data/formats.py": ["renamed"]},
    "evaluation/constitution.py": {"outputs/report.py": ["side_by_side"]},
    "federation/privacy.py": {"federation/rounds.py": ["draw_participants"]},
    "federation/rounds.py": {"outputs/files.py": ["replace_tensors"]},
    "grounding/samples.py": {
        "generation/scoring.py": ["ScoredAnswer", "Prompt", "prompt_tokens", "NOT_FINITE", "_suffix_of"]
    },
    "stages/constitution.py": {
        "runs/arguments.py": [
            "flags_for_all",
            "flags_of_adapter",
            "HOLD_FOR_ALL",
            "ADAPTER",
            "_given",
            "_describes_lora",
        ]
    },
    "stages/course.py": {
        "stages/constitution/build.py": ["check_runs", "_check_run", "_check_ppo"],
        "stages/shared.py": ["Speaking", "load_speaking"],
    },
    "stages/federated_learner.py": {"trainers/shared.py": ["schedule_of"]},
    "stages/own_pictures.py": {"stages/shared.py": ["files_changed"]},
    "stages/pretrain.py": {
        "trainers/pretraining/muon.py": ["refusals_of_muon"],
        "trainers/shared.py": ["shards_parameters"],
    },
    "stages/pretrain_trainers.py": {"trainers/pretraining/trainer.py": ["optimizer_of", "loss_settings"]},
    "stages/rlhf.py": {"stages/rlhf/flags.py": ["RlhfArguments", "Row", "CALIBRATION_PROMPTS"]},
    "stages/rlhf_pictures.py": {
        "stages/rlhf/build.py": ["check_rows", "check_frozen", "words_for_a_picture", "refuse_words", "next_lines"]
    },
    "stages/sft.py": {"stages/sft/flags.py": ["SftArguments", "default_settings", "check", "NO_ROWS", "_is_adapter"]},
    "stages/sft_retrieval.py": {
        "stages/sft/flags.py": ["RetrievalArguments", "FRACTION", "TOP_K", "check", "sft_retrieval", "_files"]
    },
    "stages/tools.py": {"runs/arguments.py": ["given_words"]},
}
M = dict(moves)
S = {k: dict(v) for k, v in splits.items()}
# ---- scaling
del M["scaling/reports.py"]
M["scaling/plan_report.py"] = ["scaling/plan_report.py", "scaling/configs.py"]
# ---- data
M["data/row_limits.py"] = ["data/row_limits.py", "data/parquet_rows.py"]
M["data/world/documents.py"] = ["data/world/documents.py", "data/world/reasoning_documents.py"]
M["data/world/passages.py"] = [
    "data/world/passages.py",
    "data/world/passage_tasks.py",
    "data/world/passage_documents.py",
]
M["data/world/tool_documents.py"] = ["data/world/tool_documents.py"]
M["data/curation/options.py"] = ["data/curation/options.py"]
M["data/curation/inputs.py"] = [x for x in M["data/curation/inputs.py"] if "reader" not in x]
M["data/curation/pipeline.py"] = ["data/curation/pipeline.py", "data/curation/reader.py", "data/curation/examples.py"]
# ---- models
C = "models/conversion/"
M[C + "families.py"] = ["models/family_rows.py", "models/more_family_rows.py", "models/unsupported_families.py"]
M[C + "expert_families.py"] = ["models/expert_family_rows.py", "models/latent_family_rows.py"]
M[C + "mixed_families.py"] = ["models/mixed_family_rows.py", "models/native_family.py"]
F = "models/family/"
M[F + "configuration_hfllm.py"] = ["models/configuration_hfllm.py"]
M[F + "configuration_fields_hfllm.py"] = [
    "models/expert_fields_hfllm.py",
    "models/latent_fields_hfllm.py",
    "models/layer_types_hfllm.py",
]
M[F + "configuration_hfllm_vision.py"] = ["models/configuration_hfllm_vision.py"]
M[F + "linear_attention_hfllm.py"] = ["models/linear_hfllm.py"]
M[F + "delta_rule_hfllm.py"] = ["models/delta_rule_hfllm.py", "models/delta_chunks_hfllm.py"]
L = "models/loading/"
M[L + "saved.py"] = [
    "models/loading.py",
    "models/stored.py",
    "models/context.py",
    "models/generation_settings.py",
    "models/vocabulary.py",
]
M[L + "weights.py"] = [
    "models/weights.py",
    "models/precision.py",
    "models/fingerprint.py",
    "models/outputs_compared.py",
]
M[L + "adapters.py"] = ["models/adapters.py", "models/merging.py", "models/scorers.py"]
M[L + "folders.py"] = ["models/whole_folders.py"]
M[L + "probes.py"] = ["models/probes.py"]
# ---- outputs
M["outputs/checkpoints.py"] = ["outputs/checkpoints.py", "outputs/checksums.py"]
# ---- generation
P = "generation/packed/"
M[P + "model.py"] = [P + "model.py", P + "layer.py", P + "projections.py"]
M[P + "ragged_model.py"] = [P + "ragged_model.py", P + "ragged_cache.py"]
M["generation/responses.py"] = ["generation/responses.py", "generation/voting.py"]
M[P + "fast.py"] = ["generation/fast.py"]
# ---- runs
M["runs/stage.py"] = ["runs/stage.py", "runs/resuming.py"]
M["runs/identity.py"] = ["runs/identity.py"]
M["runs/lock.py"] = ["runs/lock.py"]
M["runs/flags.py"] = ["runs/ranges.py", "runs/libraries.py", "runs/json_flags.py", "runs/remote_code.py"]
M["runs/command_line.py"] = ["runs/command_line.py"]
M["runs/parser.py"] = ["runs/parser.py"]
# ---- trainers
M["trainers/callbacks.py"] = [
    "trainers/callbacks.py",
    "trainers/checksums.py",
    "trainers/samples.py",
    "trainers/tables.py",
]
M["trainers/monitors.py"] = ["trainers/monitors.py", "trainers/stalled_weights.py", "trainers/ppo/stalled_policy.py"]
M["trainers/run_record.py"] = ["trainers/run_record.py"]
del M["trainers/shared.py"]
M["trainers/engines.py"] = ["trainers/sharding.py", "trainers/dropout.py"]
M["trainers/mixins.py"] = ["trainers/interruptions.py", "trainers/exact_evaluation.py"]
M["trainers/learning_rate.py"] = ["trainers/learning_rate.py"]
M["trainers/ppo/config.py"] = ["trainers/ppo/config.py", "trainers/ppo/default_rates.py"]
M["trainers/ppo/options.py"] = ["trainers/ppo/options.py"]
D = "trainers/distillation/"
M[D + "trainer.py"] = [D + "trainer.py"]
M[D + "config.py"] = [D + "config.py"]
M[D + "options.py"] = [D + "options.py"]
# ---- stages
T = "stages/"
M[T + "convert.py"] = [T + "convert.py", T + "merge.py"]
M[T + "push.py"] = [T + "push.py"]
M[T + "pretrain/tokenizer.py"] = [T + "tokenizer.py"]
M[T + "evaluate/compare.py"] = [T + "compare.py"]
for name, flags, build, report in (
    (
        "ground",
        ["ground"],
        ["ground_data", "ground_evaluation", "ground_confidence", "ground_verification"],
        ["grounding", "grounding_report"],
    ),
    ("reason", ["reason"], ["reason_data", "reason_evaluation"], ["reasoning", "reasoning_report"]),
    ("tools", ["tools", "tools_runs"], ["tools_steps", "tools_data", "tools_evaluation"], ["tools", "tools_report"]),
):
    del M[f"{T}{name}.py"]
    M[f"{T}{name}/flags.py"] = [f"{T}{x}.py" for x in flags]
    M[f"{T}{name}/build.py"] = [f"{T}{x}.py" for x in build]
    M[f"{T}{name}/report.py"] = [f"evaluation/{x}.py" for x in report]
M[T + "constitution/flags.py"] = [T + "constitution.py", T + "constitution_runs.py", T + "constitution_checks.py"]
M[T + "constitution/build.py"] = [
    T + "constitution_steps.py",
    T + "constitution_data.py",
    T + "constitution_evaluation.py",
]
S["stages/course.py"] = {
    "stages/shared.py": ["Speaking", "load_speaking"],
    "stages/constitution/flags.py": ["check_runs", "_check_run", "_check_ppo"],
}
M[T + "constitution/report.py"] = ["evaluation/constitution.py", "evaluation/constitution_report.py"]
M[T + "federated/build.py"] = [
    T + "federated_learner.py",
    T + "federated_clients.py",
    T + "federated_server.py",
    T + "federated_flower.py",
]
M[T + "federated/flags.py"] = [T + "federated.py", T + "federated_data.py", T + "federated_pairs.py"]
M["evaluation/judged.py"] = ["evaluation/responses.py"]
M["evaluation/suites/question_rows.py"] = ["evaluation/suites/question_rows.py"]
S["stages/pretrain.py"] = {
    "trainers/engines.py": ["shards_parameters"],
    "trainers/pretraining/muon.py": ["refusals_of_muon"],
}
S["stages/federated_learner.py"] = {"trainers/engines.py": ["schedule_of"]}
S["stages/sft_retrieval.py"] = {"stages/sft/flags.py": ["RetrievalArguments", "FRACTION", "TOP_K", "check", "_files"]}
S["federation/rounds.py"] = {"federation/updates.py": ["replace_tensors"]}
S["stages/evaluate_report.py"] = {
    "stages/evaluate/flags.py": ["CHANGES", "MOST_READ", "refuse_foreign_changes", "slug"]
}
S["stages/federated_data.py"] = {"stages/federated/build.py": ["Local", "load_local", "_with_adapter"]}
S["grounding/samples.py"] = {"generation/scoring.py": ["ScoredAnswer", "Prompt", "prompt_tokens", "NOT_FINITE"]}
DEDUPE = {
    ("data/curation/content.py", "Verdict"): "data/curation/filters.py",
    ("rewards/reasoning.py", "RewardFunction"): "rewards/functions.py",
    ("stages/expert_iteration_data.py", "Row"): "stages/expert_iteration.py",
}
RENAMES = {
    ("scaling/towers.py", "LARGEST"): "LARGEST_TOWER",
    ("data/padding.py", "pieces_of"): "token_pieces",
    ("data/world/reasoning_documents.py", "WORDS"): "REASONING_WORDS",
    ("data/world/passage_documents.py", "WORDS"): "PASSAGE_WORDS",
    ("data/world/passage_documents.py", "_echo"): "_echo_of_names",
    ("data/world/reasoning.py", "Told"): "ToldFacts",
    ("data/world/labelled.py", "ASKED"): "KINDS_ASKED",
    ("data/world/tool_tasks.py", "CHANGED"): "CHANGED_FACT",
    ("data/world/rubric.py", "WELL_SAID"): "WELL_SAID_SCORE",
    ("evaluation/interpreting/encoding.py", "PAIRS"): "PAIR_UNITS",
    ("evaluation/interpreting/encoding.py", "SOME"): "SOME_UNITS",
    ("evaluation/suites/interpretability_report.py", "_trace"): "_trace_map",
    ("grounding/dense.py", "FILE"): "VECTORS_FILE",
    ("models/native_families.py", "_one_line"): "_message_line",
    ("models/vision_conversion.py", "TRUNK"): "VISION_TRUNK",
    ("stages/constitution_runs.py", "Course"): "ConstitutionCourse",
    ("stages/constitution_runs.py", "SL"): "SL_RUN",
    ("stages/ground_verification.py", "TOP_K"): "PASSAGES_READ",
    ("evaluation/grounding.py", "Answered"): "GroundedAnswer",
    ("data/world/tool_tasks.py", "SHOWN"): "SHOWN_PART",
    ("stages/evaluate_pictures.py", "check"): "check_pictures",
    ("stages/federated_pairs.py", "NOTHING"): "NO_PAIR",
    ("stages/quantize_pictures.py", "schemes_to_compare"): "picture_schemes",
    ("stages/quantize_pictures.py", "check"): "check_pictures",
    ("stages/quantize_pictures.py", "make_evaluation"): "picture_evaluation",
    ("stages/reward_pictures.py", "user_comparisons"): "picture_comparisons",
    ("stages/reward_pictures.py", "check"): "check_pictures",
    ("stages/sft_pictures.py", "instruction_data"): "picture_instructions",
    ("stages/sft_pictures.py", "check"): "check_pictures",
    ("stages/sft_retrieval.py", "check"): "check_retrieval",
}


def post(repo):
    from pathlib import Path

    def sub(path, *pairs):
        p = Path(repo, path)
        if not p.exists():
            return
        text = p.read_text()
        for old, new in pairs:
            if old not in text:
                pass
            text = text.replace(old, new)
        p.write_text(text)

    for target, line in DOCS.items():
        at = Path(repo, "hfllm", target)
        if target not in M or not at.exists() or not at.read_text().startswith('"""'):
            continue
        text = at.read_text()
        first = ast.get_docstring(ast.parse(text)).split("\n\n")[0]
        if text.startswith(f'"""{first}') and first != line:
            at.write_text(text.replace(f'"""{first}', f'"""{line}', 1))

    from edits import post2

    post2(repo)

    def mine(path):
        return not ONLY or path.startswith(tuple(f"hfllm/{x}" for x in STEPS[ONLY]))

    sub(
        "hfllm/evaluation/suites/robustness.py",
        (
            """Only the world's compliance is exact. On your rows whatever does not refuse by `hfllm.evaluation.suites.refusals` complies,
and so does, in the world too, whatever follows a prefilled beginning without a refusal. The prefilled words themselves
are not judged.""",
            """Only the world's compliance is exact. On your rows whatever does not refuse by `hfllm.evaluation.suites.refusals`
complies, and so does, in the world too, whatever follows a prefilled beginning without a refusal. The prefilled words
themselves are not judged.""",
        ),
    )
    sub(
        "hfllm/grounding/uncertainty.py",
        (
            """Every measure takes rows and their meanings (`hfllm.grounding.uncertainty`; by default normalized words), and returns (N,)
float64. `CONFIDENCE` turns those that are based on a probability into one. P(True) is in `hfllm.grounding.uncertainty`.""",
            """Every measure takes rows and their meanings (by default normalized words), and returns (N,) float64. `CONFIDENCE` turns
those that are based on a probability into one. P(True) asks the model itself.""",
        ),
    )
    sub(
        "hfllm/outputs/report.py",
        (
            "# - `NAME_before`, `NAME_after`, `NAME_change`, `NAME_change_se`, `NAME_n`: the same prompts before and after training.\n#   The error",
            "# - `NAME_before`, `NAME_after`, `NAME_change`, `NAME_change_se`, `NAME_n`: the same prompts before and after\n#   training. The error",
        ),
    )
    sub(
        "hfllm/grounding/abstention.py",
        (
            """# - `learn_then_test`: the share of wrong answers **among those given** is at most alpha **with probability 1 - delta**
#   over calibration sets. This risk need not fall with the threshold, so that the first method does not apply to it.
""",
            """# - `learn_then_test`: the share of wrong answers **among those given** is at most alpha **with probability
#   1 - delta** over calibration sets. This risk need not fall with the threshold, so that the first method does not
#   apply to it.
""",
        ),
        (
            """# - `control_risk`: the risk of an answer that is **given and wrong**, over all prompts, is at most alpha **on average**
#   over calibration sets. Abstaining from everything has risk 0. An answer among those given may be wrong more often.
""",
            """# - `control_risk`: the risk of an answer that is **given and wrong**, over all prompts, is at most alpha **on
#   average** over calibration sets. Abstaining from everything has risk 0. An answer among those given may be wrong
#   more often.
""",
        ),
    )
    sub(
        "hfllm/outputs/report.py",
        (
            """# - `NAME_se`, `NAME_n`: the standard error of the mean `NAME`, and the number of prompts or rows that it is taken over;
""",
            """# - `NAME_se`, `NAME_n`: the standard error of the mean `NAME`, and the number of prompts or rows that it is taken
#   over;
""",
        ),
    )
    sub(
        "hfllm/federation/rounds.py",
        ("for field, value in ((", "for name_of, value in (("),
        ('f"{field} of the server', 'f"{name_of} of the server'),
    )
    sub("tests/evaluation/test_lm_eval_suite.py", ("LmEval,  # noqa: E402", "LmEval,"))
    inits = {
        "models/family": "The architecture: the files that travel with saved weights, and the presets.",
        "models/conversion": "Conversion between the family and native architectures, by one table of families.",
        "models/loading": "Saved models, adapters and weights: read, checked, merged and written whole.",
        "data/images": "Images in files, and in the rows of any stage.",
        **{f"stages/{x}": f"The {x} recipe: flags.py (light) and build.py (heavy)." for x in ("rlhf", "sft")},
        **{
            f"stages/{x}": f"The {x} recipe: flags.py (light), build.py (heavy) and report.py."
            for x in ("constitution", "ground", "reason", "tools", "vision", "federated")
        },
        "stages/pretrain": "The pretrain recipe, and that of the tokenizer before it: flags.py (light) and build.py (heavy).",
        "stages/evaluate": "The evaluate recipe, flags.py (light) and build.py (heavy), and compare, which reads samples.",
    }
    for folder, text in inits.items():
        at = Path(repo, "hfllm", folder)
        if at.is_dir() and list(at.glob("*.py")):
            (at / "__init__.py").write_text(f'"""{text}"""\n')
    sub("hfllm/stages/__init__.py", ("one file for each stage", "a file or a folder for each stage"))
    if Path(repo, "hfllm/models/family").is_dir():
        arch = Path(repo, "tests/test_architecture.py")
        text = arch.read_text()
        a, b = text.index("    beside = {"), text.index("    for name, libraries in beside.items():")
        text = (
            text[:a]
            + """    beside = {
        "attention_hfllm": {"torch", "transformers", "collections", "copy", "functools", "math", "typing"},
        "attention_masks_hfllm": {"torch", "transformers", "collections", "copy", "dataclasses", "typing"},
        "configuration_fields_hfllm": {"dataclasses", "difflib", "typing"},
        "configuration_hfllm": {"transformers", "huggingface_hub", "packaging", "os"},
        "configuration_hfllm_vision": {"transformers", "huggingface_hub", "os"},
        "delta_rule_hfllm": {"torch", "transformers", "collections", "contextlib"},
        "experts_hfllm": {"torch", "transformers", "collections", "itertools", "weakref"},
        "layers_hfllm": {"torch", "transformers"},
        "linear_attention_hfllm": {"torch", "transformers", "collections", "math", "typing"},
        "modeling_hfllm": {"torch", "transformers", "functools", "typing"},
        "modeling_hfllm_vision": {"torch", "transformers", "dataclasses", "functools"},
        "presets": {"collections", "copy", "difflib", "typing"},
    }
"""
            + text[b:]
        )
        text = text.replace(
            'imports(PACKAGE / "models" / f"{name}.py")', 'imports(PACKAGE / "models" / "family" / f"{name}.py")'
        )
        text = text.replace(
            '{f"hfllm.models.{each}" for each in beside}', '{f"hfllm.models.family.{each}" for each in beside}'
        )
        text = text.replace(
            """    {"models", "data", "outputs"},
    {"scaling", "generation", "rewards", "environments", "compression", "multimodal", "runs"},""",
            """    {"models", "data", "outputs"},
    {"generation"},
    {"scaling", "rewards", "environments", "compression", "multimodal", "runs"},""",
        )
        arch.write_text(text)
        sub(
            "tests/models/test_trusted_loading.py",
            ('ROOT / "hfllm" / "models" / "loading.py"', "LOADING"),
            ("hfllm.models.loading.saved says it", "hfllm.models.loading.saved says it"),
        )
        t = Path(repo, "tests/models/test_trusted_loading.py")
        text = t.read_text()
        text = text.replace(
            '@pytest.mark.parametrize("folder", ["hfllm", "recipes", "benchmarks"])',
            'LOADING = ROOT / "hfllm" / "models" / "loading" / "saved.py"\n\n\n@pytest.mark.parametrize("folder", ["hfllm", "recipes", "benchmarks"])',
            1,
        )
        t.write_text(text)
    y = Path(repo, ".ci/faults.yaml")
    if Path(repo, "hfllm/rewards/functions.py").read_text().count("-coefficient * max(length - free, 0)") == 2:
        y.write_text(
            y.read_text().replace(
                """  old: -coefficient * max(length - free, 0) for length in lengths
  new: -coefficient * max(length, 0) for length in lengths""",
                """  old: |-
    map(sum, action_mask)
            return [-coefficient * max(length - free, 0)
  new: |-
    map(sum, action_mask)
            return [-coefficient * max(length, 0)""",
            )
        )

    if Path(repo, "hfllm/outputs/statistics.py").exists():
        t = Path(repo, "tests/test_architecture.py")
        text = t.read_text().replace(
            "    assert public == {*promised.__all__}\n", "    assert {*promised.__all__} <= public\n"
        )
        t.write_text(
            text.replace(
                "getattr(calibration, name) for name in public)",
                "getattr(calibration, name) for name in promised.__all__)",
            ).replace(
                "getattr(statistics, name) for name in public)",
                "getattr(statistics, name) for name in promised.__all__)",
            )
        )
    readme = Path(repo, "README.md")
    text = readme.read_text()
    a, b = text.index("hfllm/\n  models/"), text.index("recipes/         one script")
    rooms = {
        "models": ("the architecture: {}", "family/ modeling_hfllm.py conversion/ loading/ presets.py"),
        "data": ("{}", "sources.py formats.py packing.py images/ curation/ world/"),
        "outputs": ("results of a run: {}", "report.py statistics.py checkpoints.py card.py hub.py"),
        "scaling": ("memory, speed, plans, scaling laws; no torch", ""),
        "generation": ("sampling, decoding, scoring: {}", "responses.py scoring.py packed/ speculative/"),
        "rewards": ("reward functions, models and ensembles behind one signature", ""),
        "environments": ("tools and episodes", ""),
        "compression": ("quantization: int8, NF4", ""),
        "multimodal": ("images", ""),
        "runs": ("the engine of all recipes: {}", "stage.py pipeline.py launcher.py"),
        "trainers": ("{}", "ppo/ distillation/ pretraining/ callbacks.py"),
        "evaluation": ("{}", "alignment.py perplexity.py before_after.py suites/ interpreting/"),
        "grounding": ("{}", "retrieval.py uncertainty.py abstention.py verification.py"),
        "synthesis": ("{}", "constitution.py revisions.py answers.py"),
        "federation": ("{}", "rounds.py privacy.py transports.py"),
        "stages": ("flags and builders of recipes/NAME.py", ""),
    }
    lines = ["hfllm/"]
    for room, (about, names) in rooms.items():
        have = [n for n in names.split() if list(Path(repo, "hfllm", room).glob(f"**/{n.rstrip('/')}"))]
        lines.append(f"  {room + '/':15}{about.format(', '.join(have))}")
    readme.write_text(text[:a] + "\n".join(lines) + "\n" + text[b:])


STEPS = {
    "scaling": ["scaling/"],
    "outputs": ["outputs/"],
    "models": ["models/"],
    "data": ["data/"],
    "generation": ["generation/", "multimodal/", "rewards/", "environments/", "compression/"],
    "runs": ["runs/"],
    "trainers": ["trainers/"],
    "evaluation": ["evaluation/", "grounding/", "synthesis/", "federation/"],
    "stages": ["stages/"],
}
import os

ONLY = os.environ.get("STEP")
if ONLY:
    names = list(STEPS)

    def room_step(path):
        return next((i for i, n in enumerate(names) if path.startswith(tuple(STEPS[n]))), 0)

    step = {t: max(room_step(x) for x in [t, *ss]) for t, ss in M.items()}
    of = {x: t for t, ss in M.items() for x in ss}
    for _ in range(5):
        for src, by in S.items():
            for t in by:
                if t in step and src in of:
                    step[of[src]] = max(step[of[src]], step[t])
    step["data/images/files.py"] = step["data/images/rows.py"]
    now = names.index(ONLY)
    S = {k: v for k, v in S.items() if (step[of[k]] if k in of else max(step.get(t, room_step(t)) for t in v)) == now}
    M = {t: ss for t, ss in M.items() if step[t] == now}
    here = {x for ss in M.values() for x in ss}
    RENAMES = {k: v for k, v in RENAMES.items() if k[0] in here}
    DEDUPE = {k: v for k, v in DEDUPE.items() if k[0] in here}

TITLES = {
    ("stages/federated_learner.py", "trainers/engines.py"): "schedules",
    ("stages/pretrain.py", "trainers/engines.py"): "sharding",
    ("stages/pretrain.py", "trainers/pretraining/muon.py"): "what Muon refuses",
    ("stages/pretrain_trainers.py", "trainers/pretraining/trainer.py"): "optimizer and loss",
    ("evaluation/constitution.py", "outputs/report.py"): "models side by side",
    ("grounding/samples.py", "generation/scoring.py"): "answers and their probabilities",
    ("federation/privacy.py", "federation/rounds.py"): "who takes part",
    ("federation/rounds.py", "federation/updates.py"): "files of tensors",
    ("stages/course.py", "stages/shared.py"): "models that answer",
    ("stages/course.py", "stages/constitution/flags.py"): "checks of runs",
    ("stages/rlhf_pictures.py", "stages/rlhf/build.py"): "pictures",
    ("stages/own_pictures.py", "stages/shared.py"): "files of pictures",
    ("stages/constitution.py", "runs/arguments.py"): "flags that hold for all runs",
    ("stages/tools.py", "runs/arguments.py"): "words of given flags",
    ("stages/federated_data.py", "stages/federated/build.py"): "one organisation",
    ("data/loading.py", "data/formats.py"): "renamed columns",
    ("stages/evaluate_report.py", "stages/evaluate/flags.py"): "files of changes",
    "models/family_rows.py": "the table of families",
    "models/more_family_rows.py": "families of other layouts",
    "models/mixed_family_rows.py": "layers of several types",
    "models/native_family.py": "what a row is",
    "models/expert_family_rows.py": "experts",
    "models/latent_family_rows.py": "latent attention",
}

PLAN = {"titles": TITLES, "post": post, "moves": M, "splits": S, "renames": RENAMES, "dedupe": DEDUPE}
