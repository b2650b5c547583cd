"""Learning rate of DeepSeek-V2's pre-training (section 3.1.2 of the report): linear warmup, then two steps down."""

DECAY = 0.316
DECAY_AFTER = (0.6, 0.9)  # shares of the training tokens; all steps of a phase have about as many tokens


def learning_rate(step: int, num_steps: int, max_lr: float, warmup_steps: int) -> float:
    """Rate of one step, counted from 0: warmup reaches `max_lr` at step `warmup_steps - 1`; the decay multiplies it."""
    if not 0 <= step < num_steps:
        raise ValueError(f"step must be in [0, {num_steps}), got {step}")
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    decays = sum(step >= share * num_steps for share in DECAY_AFTER)
    return float(max_lr * warmup * DECAY**decays)
