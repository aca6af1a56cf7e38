"""Weight updates as activation shifts: steer any decoder of transformers.

`import steer_nb` is enough: every public name is here, and its module is imported when the name is first used, so that
looking for sites does not load the training stack."""

__version__ = "0.1.0"

_ROOMS = {
    "sites": ("SITES", "Site", "SiteError", "available_sites", "blocks"),
    "hooks": ("capture", "edit"),
    "adapters": ("Adapter", "make_adapter", "adapter_size"),
    "steering": ("Steering", "SteeringConfig", "SteeringError", "load_steering", "prompt_ends", "steer", "steerings"),
    "zoo": ("tiny_model",),
    "equivalence": ("EquivalenceError", "Shifts", "SiteScores", "block_shift", "equivalent_shifts", "first_order_logits", "first_order_share",
                    "glu_shift", "mlp_share", "order_of_error", "pre_mlp_reach", "site_scores", "update_between", "update_from_lora"),
    "oracle": ("OracleError", "OracleFit", "error_growth", "fit_oracle", "logit_divergence", "oracle_divergence", "oracle_shifts",
               "shift_profile", "shifted"),
    "convert": ("ConvertError", "Lora", "NearestLora", "from_lora", "nearest_lora", "to_bias", "to_control_vector", "to_gguf_lora", "to_lora"),
    "assets": ("AssetError", "load_model"),
    "tasks": ("Example", "Task", "TaskError", "load_task", "task_batches"),
    "train": ("Method", "Run", "TrainConfig", "TrainError", "fit", "tuned_copy"),
    "joint": ("Halves", "JointConfig", "JointError", "halves"),     # `steer_nb.joint` is the module, as with evaluate
    "methods": ("METHODS", "MethodError", "apply_method", "load_method"),
    "experiments": ("Experiment", "PRESETS", "Spec", "Store", "dry_run", "run_grid"),
    "evaluate": ("Result",),        # `steer_nb.evaluate` is the module; the function is `steer_nb.evaluate.evaluate`
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}
__all__ = ["__version__", *_ROOM_OF]


def __getattr__(name):
    from importlib import import_module

    if name in _ROOM_OF:
        return getattr(import_module(f"steer_nb.{_ROOM_OF[name]}"), name)
    if name in _ROOMS:
        return import_module(f"steer_nb.{name}")
    raise AttributeError(f"module 'steer_nb' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
