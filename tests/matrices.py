"""The kinds of faults (F), configurations (C) and artefacts (K) that a run must survive or refuse, and where each is
asserted: FILE::TEST, or FILE::TABLE[case]. `test_matrices.py` looks for every one of them, and compares what is said.
"""

F = "test_reliability.py"
HARNESS = "faults/harness.py::SIGNALS"
KINDS: dict[str, tuple[str, list[str]]] = {
    "F1": ("killed at a random time", [HARNESS, "test_faults.py::test_killed_runs_end_as_if_nothing_had_happened"]),
    "F2": ("the same with TMPDIR on another device", ["faults/harness.py::plain_lightning"]),
    "F3": ("SIGTERM", [HARNESS, f"{F}::test_a_signal_finishes_the_step_saves_and_says_how_to_go_on"]),
    "F4": ("SIGINT", [HARNESS, f"{F}::test_a_signal_finishes_the_step_saves_and_says_how_to_go_on"]),
    "F5": ("a second SIGINT", [f"{F}::test_a_second_ctrl_c_ends_at_once"]),
    "F6": ("SIGHUP", [HARNESS, f"{F}::test_a_signal_finishes_the_step_saves_and_says_how_to_go_on"]),
    "F7": ("a signal while loading", [f"{F}::test_a_signal_while_loading_or_saving_does_no_harm"]),
    "F8": ("a signal while saving", [HARNESS, f"{F}::test_a_signal_while_loading_or_saving_does_no_harm"]),
    "F9": ("disk full", ["faults/harness.py::small_disk", f"{F}::test_a_full_disk_is_said"]),
    "F10": ("not writable", ["faults/harness.py::read_only", "test_errors.py::CASES[output that cannot be written]"]),
    "F11": ("fsync fails", [f"{F}::test_a_disk_that_fails_to_sync_fails_the_save_not_the_run"]),
    "F12": ("run directory taken away", [f"{F}::test_a_run_directory_that_is_taken_away_ends_the_run"]),
    "F13": ("the clock jumps", [f"{F}::test_the_step_decides_which_checkpoint_is_the_newest"]),
    "F14": ("the loss is not finite", [f"{F}::test_records_of_a_step_that_is_not_finite_are_named"]),
    "F15": ("the gradient is not finite", ["test_module.py::test_a_gradient_that_is_not_finite_changes_no_weight"]),
    "F16": ("on one of two ranks", ["test_train.py::test_one_rank_that_is_not_finite_stops_all"]),
    "F17": ("out of memory, forward", [f"{F}::test_out_of_memory_splits_and_loses_nothing"]),
    "F18": ("out of memory, backward", [f"{F}::test_out_of_memory_splits_and_loses_nothing"]),
    "F19": ("out of memory, nothing to split", ["test_errors.py::test_out_of_memory_names_what_helps"]),
    "F20": ("out of memory in validation", [f"{F}::test_out_of_memory_in_validation_says_what_helps"]),
    "F21": ("a loader process dies", [f"{F}::test_a_dead_loader_process_ends_the_run_with_the_reason"]),
    "F22": ("data changed", [f"{F}::test_other_data_or_another_base_is_refused"]),
    "F23": (
        "another configuration, batch size or number of ranks",
        [
            "test_train.py::test_another_configuration_under_the_same_name_is_refused",
            f"{F}::test_another_cut_of_the_steps_goes_on_with_the_same_data",
        ],
    ),
    "F24": ("two runs in one directory", [f"{F}::test_a_run_at_work_refuses_a_second_one"]),
    "F25": ("W&B cannot be reached", ["test_matrices.py::test_wandb_without_a_key_or_a_network_goes_on_offline"]),
    "F26": ("a rank dies", [HARNESS]),
    "F27": ("leftovers of a killed process", [f"{F}::test_leftovers_of_a_killed_process"]),
    "F28": ("base weights cut off while mapped", [f"{F}::test_base_weights_cut_off_while_they_are_mapped"]),
    "C1": ("unknown key", ["test_errors.py::CASES[unknown keys, all of them]"]),
    "C2": ("wrong type", ["test_errors.py::CASES[wrong types and ranges, all of them]"]),
    "C3": ("a number that is none", ["test_errors.py::CASES[wrong types and ranges, all of them]"]),
    "C4": (
        "learning rate",
        [f"test_errors.py::CASES[{case}]" for case in ("learning rate of zero", "a rate that is no number")],
    ),
    "C5": ("rank", ["test_errors.py::CASES[a rank above the layer]"]),
    "C6": ("dropout", ["test_errors.py::CASES[wrong types and ranges, all of them]"]),
    "C7": ("targets that match nothing", ["test_errors.py::CASES[target that matches nothing]"]),
    "C8": ("no batch", ["test_errors.py::CASES[no budget]"]),
    "C9": ("longer than the model reads", ["test_errors.py::CASES[max_length beyond the model]"]),
    "C10": ("no end, or nothing to do", ["test_errors.py::CASES[no end]", "test_errors.py::CASES[nothing to do]"]),
    "C11": ("bf16 on a card without it", ["test_errors.py::test_bf16_on_a_gpu_without_it"]),
    "C12": ("QLoRA without bitsandbytes", ["test_errors.py::test_qlora_without_bitsandbytes"]),
    "C13": ("QLoRA over FSDP", ["test_errors.py::CASES[quantised weights over several devices]"]),
    "C14": ("a device that is not there", ["test_errors.py::CASES[a device that is not there]"]),
    "C15": ("a value that must be given", ["test_errors.py::CASES[a value that must be given]"]),
    "C16": (
        "interpolation",
        [f"test_errors.py::CASES[{case}]" for case in ("values that need each other", "a value of nothing")],
    ),
    "C17": ("numbers and words of other notations", ["test_errors.py::CASES[other notations]"]),
    "C18": ("output where something lies", ["test_errors.py::CASES[output in a model's folder]"]),
    "C19": (
        "base missing, or pickles only",
        [
            "test_errors.py::CASES[model folder missing]",
            "models/test_loading.py::test_bin_shards_are_read_without_unpickling_code",
        ],
    ),
    "C20": (
        "targets and secrets in a configuration",
        [f"test_errors.py::CASES[{case}]" for case in ("a target outside", "a secret in the configuration")],
    ),
    "K1": ("missing", ["strategies/test_adapters.py::K[folder missing]"]),
    "K2": ("a file for a folder", ["strategies/test_adapters.py::K[a file for a folder]"]),
    "K3": ("zero bytes", ["strategies/test_adapters.py::K[weights empty]", f"{F}::SAYS[empty]"]),
    "K4": ("cut off, at ten places", ["strategies/test_adapters.py::test_cut_off_or_flipped_anywhere"]),
    "K5": ("one bit, at ten places", ["strategies/test_adapters.py::test_cut_off_or_flipped_anywhere"]),
    "K6": (
        "a file of something else",
        [
            "strategies/test_adapters.py::K[a text file]",
            "test_checkpoints.py::test_a_checkpoint_of_something_else_is_named",
        ],
    ),
    "K7": (
        "a pickle that runs code",
        ["attacks.py::gadgets", "strategies/test_adapters.py::K[a pickle that runs a command]"],
    ),
    "K8": ("an address", ["attacks.py::attacks"]),
    "K9": ("parts of a checkpoint missing", ["test_checkpoints.py::test_every_part_of_a_checkpoint_is_asked_for"]),
    "K10": ("values that are not finite", ["strategies/test_adapters.py::K[not a number]"]),
    "K11": (
        "a newer format",
        ["strategies/test_adapters.py::K[manifest of a newer format]", f"{F}::SAYS[newer format]"],
    ),
    "K12": (
        "another base",
        ["strategies/test_adapters.py::K[another base]", f"{F}::test_other_data_or_another_base_is_refused"],
    ),
    "K13": (
        "another rank, alpha, targets, names",
        [
            f"strategies/test_adapters.py::K[{case}]"
            for case in ("another rank", "alpha changed", "other targets", "renamed keys", "another shape")
        ],
    ),
    "K14": ("half the keys", ["strategies/test_adapters.py::K[half the keys]"]),
    "K15": ("another key", ["strategies/test_adapters.py::K[another key]"]),
    "K16": (
        "adapter_config.json missing, broken, with other keys",
        [
            f"strategies/test_adapters.py::K[{case}]"
            for case in ("configuration missing", "configuration not JSON", "a key of a newer PEFT")
        ],
    ),
    "K17": ("a huge rank", ["strategies/test_adapters.py::K[a rank beyond all memory]"]),
    "K18": ("a configuration that names imports", ["strategies/test_adapters.py::K[code to import]"]),
    "K19": (
        "the newest damaged, an older one whole",
        [f"{F}::test_a_damaged_newest_checkpoint_is_left_for_an_older_one"],
    ),
    "K20": ("a link outwards", ["strategies/test_adapters.py::K[a link out of the folder]"]),
    "K21": ("merging", ["test_export.py::test_what_cannot_be_exported"]),
    "K22": ("a header of 2^60 bytes", ["strategies/test_adapters.py::K[a header of 2^60 bytes]"]),
}
