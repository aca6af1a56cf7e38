"""Weight updates as activation shifts: steer any decoder of transformers.

`from steer_nb import …` gives every public name. A module is imported when one of its names is
first used, so that `import steer_nb` loads neither torch nor the training stack.
"""

__version__ = "0.1.0"

_PUBLIC = {
    "core.errors": ("SteerError",),
    "core.sites": ("SITES", "Site", "SiteError", "available_sites", "blocks"),
    "core.hooks": ("capture", "edit"),
    "core.adapters": ("Adapter", "make_adapter", "adapter_size"),
    "core.passes": ("prompt_ends",),
    "core.precision": ("half_precision",),
    "core.config": ("SteeringConfig",),
    "core.steering": ("Steering", "SteeringSum", "steer", "steerings"),
    "core.loading": ("load_steering",),
    "core.arithmetic": ("merge_steerings", "sum_steerings"),
    "core.reuse": ("prefix_cache",),
    "testing.tiny_models": ("tiny_model",),
    "theory.updates": ("update_between", "update_from_lora"),
    "theory.first_order": (
        "Shifts",
        "block_shift",
        "equivalent_shifts",
        "first_order_logits",
        "first_order_share",
        "order_of_error",
    ),
    "theory.glu": ("glu_shift", "mlp_share", "pre_mlp_reach"),
    "theory.site_scores": ("SiteScores", "site_scores"),
    "theory.oracle": ("logit_divergence", "oracle_divergence", "oracle_shifts", "shifted"),
    "theory.distill": ("OracleFit", "fit_oracle"),
    "theory.profiles": ("error_growth", "shift_profile"),
    "theory.sequential": ("sequential_shifts",),
    "theory.visible": ("visible_shares",),
    "convert.bias": ("to_bias",),
    "convert.lora": ("Lora", "from_lora", "to_lora"),
    "convert.gguf": ("to_control_vector", "to_gguf_lora"),
    "convert.nearest_lora": ("NearestLora", "nearest_lora"),
    "convert.easysteer": ("to_easysteer",),
    "convert.vllm_lens": ("to_vllm_lens",),
    "data.models": ("load_model",),
    "data.examples": ("Example",),
    "data.encoding": ("task_batches",),
    "data.tasks": ("load_task",),
    "data.records": ("Task", "load_records"),
    "training.config": ("TrainConfig",),
    "training.method": ("Method",),
    "training.run": ("Run",),
    "training.fit": ("fit",),
    "methods.joint": ("JointConfig", "joint"),
    "methods.parts": ("Parts", "compare_parts"),
    "methods.registry": ("METHODS", "apply_method", "load_method"),
    "methods.tuned": ("tuned_copy",),
    "methods.contrast": ("contrast_vector",),
    "evaluation.result": ("Result", "evaluate"),
    "integrations.lm_eval_tasks": ("to_lm_eval_task",),
    "evaluation.side_effects": ("SideEffects", "side_effects"),
    "integrations.trl": ("reference_model", "use_reference"),
    "integrations.serve": ("serve", "server_app"),
    "experiments.forecast": ("Forecast", "plan_training"),
    "experiments.store": ("Spec", "Store"),
    "experiments.jobs": ("Experiment",),
    "experiments.grid": ("run_grid",),
    "experiments.dry_run": ("dry_run",),
    "experiments.presets": ("PRESETS",),
    "visual.plots": (
        "plot_accuracy",
        "plot_bench",
        "plot_costs",
        "plot_curve",
        "plot_norms",
        "plot_order",
        "plot_scores",
        "plot_shift",
        "plot_sizes",
        "plot_table",
    ),
    "visual.playground": ("explore",),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name):
    from importlib import import_module

    from .core.imports import uncollected

    if name not in _MODULE_OF:
        raise AttributeError(f"module 'steer_nb' has no attribute {name!r}")
    with uncollected():
        value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value  # the next use does not pass here
    return value


def __dir__():
    return sorted(__all__)
