"""Settings of a training that contradict each other, refused on the command line and when the workflow is planned."""

from cxt.config.network import AdapterConfig, ModelConfig
from cxt.config.training import TrainingConfig
from cxt.errors import BadRequest


def check_training(
    training: TrainingConfig,
    network: ModelConfig,
    adapter: AdapterConfig | None,
    *,
    has_lora: bool,
    parent_objective: str | None,
    on_gpu: bool,
) -> None:
    """Refuse settings of a training that cannot be fulfilled together.

    Parameters
    ----------
    training, network : TrainingConfig, ModelConfig
    adapter : AdapterConfig or None
        None for a plain model.
    has_lora : bool
        Whether it trains a LoRA.
    parent_objective : str or None
        What the parent was trained to predict; None for random weights.
    on_gpu : bool
        Whether it trains on GPUs.

    Raises
    ------
    BadRequest
        Naming the first contradiction.
    """
    objective = training.objective
    if training.attention == "flex" and not on_gpu:
        raise BadRequest("attention flex trains on GPUs only: FlexAttention has no gradients on a CPU; use attention split")
    if objective != "autoregressive" and training.loss_path != "target":
        raise BadRequest(
            f"loss_path {training.loss_path} is for the objective autoregressive, not for {objective}; use loss_path target"
        )
    if objective == "joint" and network.start_token_in_prefix:
        raise BadRequest(
            "the objective joint needs sources that do not see the start token; set start_token_in_prefix to false, or use the "
            "objective autoregressive or marginal"
        )
    if network.reads_rates and training.precision == "bf16-true":
        raise BadRequest(
            "precision bf16-true would round the rates that this network reads; use bf16-mixed, or set reads_rates to false"
        )
    if objective == "masked" and adapter is not None:
        raise BadRequest(
            "the objective masked cannot train an adapter, which mixes the counts of all windows, also of hidden ones; use "
            "another objective, or train the backbone without an adapter"
        )
    if parent_objective == "masked" and adapter is not None and adapter.unfreeze_strategy != "all":
        raise BadRequest(
            "the parent was trained with the objective masked, which does not train the head, and this adapter would leave it "
            "frozen; use unfreeze_strategy all, or first train a model from the parent without an adapter"
        )
    if objective == "masked" and training.ema_decay:
        raise BadRequest(
            "ema_decay cannot be used with the objective masked, whose head and mask vector are not averaged; set it to 0"
        )
    if objective == "contrastive":
        _check_contrastive(training, network)
    if training.weight_noise and adapter is not None:
        raise BadRequest(
            "weight_noise cannot be used with an adapter, whose backbone is trained without dropout and noise; set it to 0"
        )
    if training.quantized_bits and has_lora:
        raise BadRequest(
            "quantized_bits cannot be used with LoRA, whose checkpoint holds no rounded weights; set it to 0, or train from "
            "the merged weights"
        )
    if has_lora and "masked" in (objective, parent_objective):
        raise BadRequest(
            "the objective masked trains no head for times, and LoRA leaves the head as it is; train all weights, with "
            "`checkpoint` instead of `lora_of`"
        )


def _check_contrastive(training: TrainingConfig, network: ModelConfig) -> None:
    """BadRequest for what the objective contrastive cannot be combined with."""
    for name in ("batch_size", "batch_size_eval"):
        if getattr(training, name) == 1:
            raise BadRequest(
                f"the objective contrastive compares the examples of a batch, but {name} is 1; set it to 2 or more"
            )
    if not network.mask_singletons:
        raise BadRequest(
            "the objective contrastive cannot train on a dataset with a mask: two views of an example have the same "
            "inaccessible intervals, which alone tell that they belong together; use a dataset without a mask, or another "
            "objective"
        )
    if not any(term.weight or term.final_weight for term in training.losses):
        raise BadRequest(
            "all weights in losses are 0, so that the objective contrastive would not train the head for times; give one of "
            "them a positive weight"
        )
    if training.ema_decay:
        raise BadRequest(
            "ema_decay cannot be used with the objective contrastive, whose projection is not averaged; set it to 0"
        )
