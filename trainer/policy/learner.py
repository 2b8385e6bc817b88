"""A policy that learns from groups of answers: which of them have a gradient, and the updates that are taken on them.

Guarantees: how a step is cut into micro-batches changes no result; numbers that are not finite stop the run before they
touch the weights; answers without an advantage have no gradient, so they are measured and not trained on, and where
none has one, weights and optimizer are left alone; no `[tokens, vocabulary]` tensor arises.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import LinearHead, selected_log_probs
from kernels.types import SelectedOutput
from logitcache.flops import forward, head
from logitcache.records import TokenSequence
from trainer.batch import Batch, batches_of
from trainer.flops import FlopLedger, Phase, add_evaluation, add_training
from trainer.loop import require_finite, take_step
from trainer.policy.groups import Drawn
from trainer.policy.settings import PolicyTraining, Surrogate
from trainer.policy.surrogate import SurrogateOutput, group_advantages, sequence_weights, surrogate_loss
from trainer.rollouts import with_own_tokens
from trainer.student import Student


@dataclass(kw_only=True, eq=False)
class Part:
    """A micro-batch of answers, R completion tokens.

    Attributes:
        batch: packed; its targets are its own tokens.
        advantage: float32[R], of each token's answer.
        weight: float32[R], which adds the loss up over the step.
        old: float32[R], log-probabilities at the weights that wrote the answers; None before the first update.
        reference: float32[R], log-probabilities under the reference; None without one.
    """

    batch: Batch
    advantage: Tensor
    weight: Tensor
    old: Tensor | None = None
    reference: Tensor | None = None

    @property
    def known(self) -> bool:
        """Whether the loss follows without log-probabilities: the ratio is 1 where the text was written."""
        return self.old is None and self.reference is None


@dataclass(frozen=True, kw_only=True, eq=False)
class Learner:
    """A policy, and how it is changed by answers.

    Attributes:
        policy: the model that learns.
        surrogate: what is minimised.
        training: micro-batches, updates, the optimizer.
        sampling_temperature: divides the logits, so that probabilities are those the text was drawn with.
        max_new_tokens: the longest answer that is allowed.
        reference: a frozen model that the policy is kept near; None for none.
    """

    policy: Student
    surrogate: Surrogate
    training: PolicyTraining
    sampling_temperature: float
    max_new_tokens: int
    reference: Student | None = None

    def parts(self, drawn: Drawn) -> tuple[list[Part], list[Part]]:
        """The answers that have a gradient, and the others."""
        advantage_B = group_advantages(drawn.reward_PG, self.surrogate.advantage).flatten()
        lengths = [sequence.completion_tokens for sequence in drawn.sequences]
        weight_B = sequence_weights(lengths, self.surrogate.normalisation, self.max_new_tokens)
        learns_B = advantage_B != 0 if self.surrogate.kl_weight == 0 else torch.ones_like(advantage_B, dtype=torch.bool)
        return self._cut(drawn, learns_B, advantage_B, weight_B), self._cut(drawn, ~learns_B, advantage_B, weight_B)

    def _cut(self, drawn: Drawn, chosen_B: Tensor, *values_B: Tensor) -> list[Part]:
        sequences: list[TokenSequence] = [drawn.sequences[place] for place in chosen_B.nonzero()[:, 0].tolist()]
        own = [with_own_tokens(sequence) for sequence in sequences]
        batches = batches_of(own, None, self.policy.device, self.training.micro_batch_tokens)
        rows = [batch.target_rows for batch in batches]
        tokens = torch.tensor([sequence.completion_tokens for sequence in sequences], dtype=torch.int64)
        split = [
            value_B[chosen_B].repeat_interleave(tokens).float().to(self.policy.device).split(rows)
            for value_B in values_B
        ]
        return [Part(batch=b, advantage=a, weight=w) for b, a, w in zip(batches, *split, strict=True)]

    def log_probs(self, over: LinearHead, part: Part, token_weight: Tensor | None = None) -> SelectedOutput:
        """Of what was written, at the temperature it was drawn with."""
        return selected_log_probs(
            over,
            part.batch.next_ids,
            temperature=self.sampling_temperature,
            backend=self.training.backend,
            token_weight=token_weight,
        )

    def measure(self, part: Part, ledger: FlopLedger, step: int) -> Tensor:
        """Entropy of each row, float32[R], of answers that are not trained on."""
        with torch.no_grad():
            entropy = self.log_probs(self.policy.head_over(part.batch), part).student_entropy
        add_evaluation(ledger, self.policy.shape, part.batch, teacher_head_flops=0, step=step, lora=self.policy.lora)
        return entropy

    def refer(self, part: Part, ledger: FlopLedger, step: int) -> None:
        """Ask the reference, if there is one."""
        if self.reference is not None:
            with torch.no_grad():
                part.reference = self.log_probs(self.reference.head_over(part.batch), part).log_probs
            cost = forward(self.reference.shape, part.batch.sequence_lengths, head_rows=part.batch.target_rows)
            ledger.add(Phase.REFERENCE_FORWARD, cost, step=step)

    def backward(self, part: Part, ledger: FlopLedger, step: int) -> tuple[SurrogateOutput, SelectedOutput]:
        """Add a part's gradient to the weights' and remember its first log-probabilities.

        The loss's gradient towards each log-probability is taken first, and handed to the kernel, which then takes
        that of the head from the logits it computes anyway. Where the gradient is not `known`, that is one more pass
        of the head; told afterwards, the kernel would need three more products.

        Raises:
            UserError: a ratio or loss that is not finite.
        """
        over, batch = self.policy.head_over(part.batch), part.batch
        at = torch.zeros_like(part.advantage)
        if not part.known:
            with torch.no_grad():
                at = self.log_probs(over, part).log_probs
            ledger.add(Phase.STUDENT_FORWARD, head(self.policy.shape, batch.target_rows), step=step)
        old = at if part.old is None else part.old
        leaf = at.detach().requires_grad_()
        out = surrogate_loss(self.surrogate, leaf, old, part.advantage, part.reference)
        require_finite("a ratio", out.ratio.sum(), step, [batch])
        loss = (out.loss * part.weight).sum()
        require_finite("the loss", loss, step, [batch])
        (gradient_R,) = torch.autograd.grad(loss, leaf)
        selected = self.log_probs(over, part, token_weight=gradient_R)
        (selected.log_probs * gradient_R).sum().backward()
        if part.old is None:
            part.old = selected.log_probs.detach()
        add_training(
            ledger,
            self.policy.shape,
            batch,
            teacher_head_flops=0,
            step=step,
            gradient_checkpointing=self.policy.gradient_checkpointing,
            lora=self.policy.lora,
        )
        return out, selected

    def learn(self, drawn: Drawn, optimizer: torch.optim.Optimizer, ledger: FlopLedger, step: int) -> dict[str, float]:
        """All updates of one rollout batch; the step's metrics, means over its updates and tokens."""
        learning, others = self.parts(drawn)
        entropy = sum(float(self.measure(part, ledger, step).double().sum()) for part in others)
        for part in learning:
            self.refer(part, ledger, step)
        sums = torch.zeros(3, dtype=torch.float64)
        grad_norm = 0.0
        for update in range(self.training.updates if learning else 0):
            for part in learning:
                out, selected = self.backward(part, ledger, step)
                values = ((out.loss.detach() * part.weight), out.clipped, out.kl)
                sums += torch.stack([value.double().sum() for value in values]).cpu()
                if update == 0:
                    entropy += float(selected.student_entropy.double().sum())
            batches = [part.batch for part in learning]
            grad_norm += take_step(self.policy, optimizer, self.training.optimisation, step, batches)
        updates, trained = self.training.updates, sum(part.batch.target_rows for part in learning)
        loss, clipped, kl = (sums / updates).tolist()
        return {
            "policy_loss": loss,
            "clip_share": clipped / max(trained, 1),
            **({} if self.reference is None else {"reference_kl_nats": kl / max(trained, 1)}),
            "student_entropy_nats": entropy / sum(one.completion_tokens for one in drawn.sequences),
            "grad_norm": grad_norm / updates,
        }
