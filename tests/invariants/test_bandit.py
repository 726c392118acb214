"""On a bandit PPO finds the known optimum of a KL-regularized reward: pi(a) ~ pi_ref(a) exp(r(a) / beta)."""

import torch
from datasets import Dataset

from hfllm.trainers.ppo.config import PPOConfig
from hfllm.trainers.ppo.trainer import PPOTrainer


def test_ppo_converges_to_the_tilted_reference(make_model, tokenizer, tmp_path):
    beta, arms = 0.5, [10, 11, 12, 13]
    reward_of = dict(zip(arms, (0.0, 0.3, 0.6, -0.4), strict=True))
    model = make_model(tie_word_embeddings=False)
    # Only the arms can be drawn: a response is one token.
    others = torch.ones(len(tokenizer), dtype=torch.bool)
    others[arms] = False

    class Arms(torch.nn.Module):
        def __init__(self, head):
            super().__init__()
            self.head, self.weight = head, head.weight

        def forward(self, hidden):
            return self.head(hidden).masked_fill(others, -1e4)

    def reward(completions, **_):
        return [reward_of[tokenizer.convert_tokens_to_ids(text[0])] for text in completions]

    def probabilities(policy, ids):
        with torch.no_grad():
            return policy(ids, use_cache=False).logits[0, -1].softmax(-1)[arms]

    names = tokenizer.convert_ids_to_tokens(arms)
    assert all(len(name) == 1 for name in names)
    args = PPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        per_device_train_batch_size=64,
        num_ppo_epochs=2,
        num_mini_batches=1,
        response_length=1,
        learning_rate=5e-3,
        value_learning_rate=5e-3,
        lr_scheduler_type="linear",
        max_steps=100,
        kl_coef=beta,
        gamma=1.0,
        lam=1.0,
        whiten_advantages=False,
        max_grad_norm=0.0,
    )
    trainer = PPOTrainer(
        model=model,
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["Go"] * 64}),
        processing_class=tokenizer,
    )
    trainer.policy.lm_head = Arms(trainer.policy.lm_head)
    trainer.reference.lm_head = Arms(trainer.reference.lm_head)
    ids = torch.tensor([tokenizer("Go")["input_ids"]])
    reference = probabilities(trainer.reference, ids)
    target = reference * torch.tensor([reward_of[arm] / beta for arm in arms]).exp()
    target /= target.sum()
    assert (reference - target).abs().max() > 0.1
    trainer.train()
    learned = probabilities(trainer.policy, ids)
    torch.testing.assert_close(learned, target, atol=0.02, rtol=0)
