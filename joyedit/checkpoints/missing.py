"""Names that diffusers and transformers document and that are not here, each with the nearest thing that is.

One table for each kind of object. Reading such a name raises an AttributeError with the table's words, so
that `hasattr` tells the truth; a name that no table knows raises the usual one.
"""

from collections.abc import Mapping
from typing import Any


class NotHereError(AttributeError):
    """A documented name of diffusers or transformers that joyedit has not."""


class Missing:
    """The attribute of a class that is not there, neither on the class nor on its objects: for documented
    class methods, which `__getattr__` of an object does not see."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, found: Any, owner: type) -> Any:
        raise lacking(owner, self.name)


def lacking(owner: type, name: str) -> AttributeError:
    """The error for an attribute that a class does not have; `owner.missing` is its table."""
    nearest = owner.missing.get(name)  # type: ignore[attr-defined]
    if nearest is None:
        return AttributeError(f"{owner.__name__!r} object has no attribute {name!r}")
    return NotHereError(f"{owner.__name__} has no {name}: {nearest}")


def _all(names: str, nearest: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), nearest)


UPLOAD = "save_pretrained(folder), then huggingface_hub.upload_folder(folder_path=folder, repo_id=...)"
INSIDE_DIFFUSERS = "it belongs to the inside of diffusers; settings are `.config`"
INSIDE_TRANSFORMERS = "it belongs to the inside of transformers"
ATTENTION = "attention is one function, joyedit.ops.attention; joyedit.ops.backend() chooses its kernel"
TRAINING = "enable_gradient_checkpointing() of a denoiser"
CASTING = "weights are held in the dtype of from_pretrained(torch_dtype=); `to(dtype)` changes it"
LORA = 'joyedit.lora.Adapters({"unet": network}) has the methods of pipelines for the adapters of one network'

CONFIGS: Mapping[str, str] = {
    "push_to_hub": UPLOAD,
    **_all("to_json_string to_json_file", "json.dumps(x.config.to_dict()), or save_config(folder)"),
    **_all("get_config_dict extract_init_dict", "load_config(name) reads the file as a dict"),
    **_all("register_to_config", "make another object: from_config(x.config, name=value)"),
    **_all("ignore_for_config has_compatibles compatibles register_for_auto_class", INSIDE_DIFFUSERS),
}

PIPELINES: Mapping[str, str] = {
    **CONFIGS,
    "download": "from_pretrained(name) fetches what it lacks; huggingface_hub.snapshot_download fetches all",
    "from_config": "from_pretrained(name), or the class with its parts",
    "register_modules": "assign the part: pipe.unet = unet",
    "parameters": "of each network in pipe.networks.values()",
    "name_or_path": "where the parts came from is not kept",
    "enable_group_offload": "enable_sequential_cpu_offload() brings one block at a time",
    **_all("maybe_free_model_hooks remove_all_hooks", "disable_offload() ends every offload"),
    **_all("hf_device_map reset_device_map", "a pipeline is on one device: pipe.device, pipe.to(device)"),
    "model_cpu_offload_seq": "networks come to the device in the order in which a run needs them",
    **_all("enable_freeu disable_freeu", "FreeU scales skip connections: hook the unet's up_blocks"),
    **_all(
        "fuse_qkv_projections unfuse_qkv_projections",
        "projections stay separate here, and the results are the same",
    ),
    "enable_lora_hotswap": "load adapters side by side, then set_adapters(name): nothing is compiled anew",
    "set_lora_device": "factors follow their network; delete_adapters(name) frees them",
    **_all(
        "load_lora_into_unet load_lora_into_transformer load_lora_into_text_encoder",
        "load_lora_weights takes a file or a state dict, with the networks' names as prefixes",
    ),
    **_all("write_lora_layers pack_weights", "save_lora_weights(folder, unet_lora_layers=...) writes a file"),
    **_all("lora_scale", "pipe.adapters.active_weights; a call's own is its cross_attention_kwargs"),
    **_all("unet_name transformer_name text_encoder_name", "networks have the names of pipe.networks"),
    **_all(
        "attention_kwargs current_timestep", "arguments of a run are not kept; callbacks are told the step"
    ),
    **_all("check_inputs check_source_inputs", "a call checks its arguments before any work"),
    **_all("get_epsilon", "joyedit.schedulers.ddim.split gives x0 and eps of a prediction"),
    **_all("get_timesteps get_inverse_timesteps", "scheduler.set_timesteps(n), then scheduler.timesteps"),
    **_all("prepare_latents prepare_image_latents", "pass latents= or image_latents= to the call"),
    **_all("prepare_extra_step_kwargs", "the call passes eta and generator to the scheduler itself"),
    "maybe_convert_prompt": "the call expands learned words itself",
    "run_safety_checker": "pipe.safety_checker(pipe.feature_extractor(images).pixel_values, images)",
    "set_use_memory_efficient_attention_xformers": ATTENTION,
    "encode_image": "pipe.image_encoder(pipe.image_processor(image).pixel_values)",
}

NETWORKS: Mapping[str, str] = {
    **CONFIGS,
    **_all("attn_processors set_attn_processor set_default_attn_processor", ATTENTION),
    **_all("load_attn_procs save_attn_procs", "pipe.load_lora_weights and pipe.save_lora_weights"),
    **_all("set_attention_backend reset_attention_backend set_attn_implementation", ATTENTION),
    **_all("set_use_npu_flash_attention enable_npu_flash_attention disable_npu_flash_attention", ATTENTION),
    **_all("set_use_xla_flash_attention enable_xla_flash_attention disable_xla_flash_attention", ATTENTION),
    "set_use_memory_efficient_attention_xformers": ATTENTION,
    **_all("fuse_qkv_projections unfuse_qkv_projections", PIPELINES["fuse_qkv_projections"]),
    **_all("enable_freeu disable_freeu", "FreeU scales skip connections: hook the up_blocks"),
    **_all("gradient_checkpointing_enable gradient_checkpointing_disable", TRAINING),
    **_all("activation_checkpointing_enable activation_checkpointing_disable", TRAINING),
    **_all("is_activation_checkpointing supports_gradient_checkpointing", TRAINING),
    "enable_layerwise_casting": CASTING,
    "dequantize": CASTING,
    "enable_group_offload": "pipe.enable_sequential_cpu_offload() brings one block at a time",
    "enable_parallelism": "a network runs on one device",
    **_all(
        "enable_cache disable_cache is_cache_enabled cache_context", "the pipeline's call takes step_cache="
    ),
    "clear_cache": "encode and decode keep nothing between calls",
    **_all("tiled_encode tiled_decode", "enable_tiling(), then encode or decode"),
    **_all("blend_h blend_v", "enable_tiling(), then encode or decode, which blend the tiles"),
    **_all("get_time_embed get_aug_embed get_class_embed process_encoder_hidden_states", INSIDE_DIFFUSERS),
    **_all("get_rotary_pos_embed", "the network's own prepare step computes the rotary tables"),
    **_all("unet_name text_encoder_name", PIPELINES["unet_name"]),
    **_all("add_adapter load_lora_adapter load_adapter", f"{LORA}; load_lora_weights adds one"),
    **_all("save_lora_adapter get_adapter_state_dict", f"{LORA}; save_lora_weights writes one"),
    **_all("set_adapter set_adapters active_adapters active_adapter", LORA),
    **_all("enable_adapters disable_adapters delete_adapters delete_adapter", LORA),
    **_all("enable_lora disable_lora fuse_lora unfuse_lora unload_lora", LORA),
    **_all("enable_lora_hotswap enable_peft_hotswap", PIPELINES["enable_lora_hotswap"]),
    **_all(
        "generate generate_batch prepare_inputs_for_generation", "Qwen3-VL reads prompts here; it writes none"
    ),
    "can_generate": "Qwen3-VL reads prompts here; it writes none",
    **_all("get_image_features", "encode_images(pixel_values, grid_thw) runs the vision tower"),
    **_all("get_video_features", "the vision tower takes stills only: encode_images(pixel_values, grid_thw)"),
    **_all(
        "get_input_embeddings set_input_embeddings resize_token_embeddings",
        "the table is a module of the network; pipe.load_textual_inversion adds words to it",
    ),
    **_all("get_output_embeddings set_output_embeddings", "Qwen3-VL's is `lm_head`; the others have none"),
    **_all("get_position_embeddings resize_position_embeddings", "the table is a module of the network"),
    **_all("get_encoder get_decoder set_encoder set_decoder", "parts are modules: `encoder`, `model`"),
    "get_compiled_call": "compile() compiles the blocks in place",
    **_all(
        "init_weights initialize_weights post_init tie_weights",
        "from_config initialises, from_pretrained reads",
    ),
    "main_input_name": "the first argument of forward",
    "config_class": "the class attribute Config",
    **_all("dummy_inputs", "docs/changing-the-code.md shows a small network and its inputs"),
    **_all(
        """accepts_loss_kwargs add_model_tags adjust_generation_fn barrier_after_gathered_checkpoint_save
        base_model base_model_prefix can_record_outputs compute_transition_scores
        continuous_batching_context_manager destroy_cached_continuous_batching_manager
        disable_input_require_grads enable_input_require_grads ep_plan fsdp_plan fsdp_size
        gather_sharded_state_dict_for_save generation_config_class get_correct_attn_implementation
        get_correct_experts_implementation get_expanded_tied_weights_keys get_experts_implementation
        get_init_context get_parameter_or_buffer heal_tokens init_continuous_batching init_parallel_plans
        input_modalities is_backend_compatible is_custom_code is_distributed_loading_by_transformers
        is_remote_code load_custom_generate loss_function mark_tied_weights_as_initialized
        maybe_distribute_model model_tags model_type named_non_persistent_buffers output_modalities pp_plan
        prepare_distribute_model retrieve_modules_from_names save_distributed_checkpoint
        set_experts_implementation set_use_kernels should_save_on_this_rank supports_context_parallel
        supports_pp_plan supports_tp_plan tp_plan tp_size use_kernels
        warn_if_padding_and_no_attention_mask""",
        INSIDE_TRANSFORMERS,
    ),
}

SCHEDULERS: Mapping[str, str] = {
    **CONFIGS,
    **_all("betas alphas_cumprod", "flow matching has no betas: its levels are `sigmas`"),
    "alphas": "1 - betas, where there are any; the levels of a flow are `sigmas`",
    **_all(
        "alpha_t sigma_t lambda_t", "from `alphas_cumprod` a: sqrt(a), sqrt(1 - a) and the log of their ratio"
    ),
    **_all("lower_order_nums this_order timestep_list", "`model_outputs` are those that are remembered"),
    **_all("predict_x0 disable_corrector", "settings are `.config`"),
    **_all("time_shift stretch_shift_to_terminal", "set_timesteps shifts the levels: see `sigmas`"),
    **_all("multistep_uni_p_bh_update multistep_uni_c_bh_update", "step predicts and corrects"),
}

TOKENIZERS: Mapping[str, str] = {
    "push_to_hub": UPLOAD,
    **_all(
        "get_vocab vocab decoder",
        "convert_tokens_to_ids and convert_ids_to_tokens; `backend` has get_vocab()",
    ),
    **_all(
        "get_added_vocab added_tokens_encoder added_tokens_decoder", "`backend`.get_added_tokens_decoder()"
    ),
    **_all("backend_tokenizer model", "the attribute is `backend`, a tokenizers.Tokenizer"),
    **_all("tokenize", "convert_ids_to_tokens(tokenizer.encode(text))"),
    **_all("convert_tokens_to_string clean_up_tokenization", "decode(ids)"),
    **_all("pad set_truncation_and_padding", "call the tokenizer with padding= and truncation="),
    **_all("padding_side truncation_side", "always the right side: pipelines drop a prefix of fixed length"),
    **_all("get_special_tokens_mask", "compare the ids with those of eos_token_id, pad_token_id, ..."),
    **_all("num_special_tokens_to_add", "count: len(tokenizer.encode(''))"),
    **_all("max_len_single_sentence max_len_sentences_pair", "model_max_length, without the special tokens"),
    **_all(
        "apply_chat_template get_chat_template",
        "pipelines write their own template; `chat_template` is the text",
    ),
    **_all("encode_message_with_chat_template parse_response get_response_parser", "no chat is held here"),
    "add_special_tokens": "add_tokens(words); the special ones are those of the folder",
    **_all(
        "all_special_tokens all_special_ids special_tokens_map", "eos_token, pad_token, ... and their ids"
    ),
    **_all("get_sentinel_tokens get_sentinel_token_ids", "convert_tokens_to_ids('<extra_id_0>')"),
    **_all("train_new_from_iterator", "the `tokenizers` library trains; give its result to the class"),
    **_all("save_vocabulary save_chat_templates", "save_pretrained writes the vocabulary and the template"),
    **_all("is_fast model_input_names pad_token_type_id", "there are input_ids and attention_mask"),
    **_all(
        """add_prefix_space clean_up_tokenization_spaces files_loaded init_inputs init_kwargs
        split_special_tokens""",
        "what the folder says is `settings`",
    ),
    **_all("name_or_path", "where it came from is not kept"),
    **_all("chat_control_tokens response_template", "no chat is held here"),
    **_all(
        """clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output deprecation_warnings
        verbose""",
        INSIDE_TRANSFORMERS,
    ),
    **_all(
        """SPECIAL_TOKENS_ATTRIBUTES add_bos_token add_eos_token can_save_slow_tokenizer convert_added_tokens
        convert_to_native_format pretrained_vocab_files_map register_for_auto_class slow_tokenizer_class
        update_post_processor vocab_files_names""",
        INSIDE_TRANSFORMERS,
    ),
}

IMAGE_SETTINGS = """crop_size size default_to_square do_center_crop do_convert_rgb do_normalize do_rescale
    do_resize image_mean image_std resample rescale_factor"""

PROCESSORS: Mapping[str, str] = {
    "push_to_hub": UPLOAD,
    **_all("to_dict to_json_string to_json_file", "`.config`, or save_pretrained(folder)"),
    **_all(IMAGE_SETTINGS, "settings are `.config`, as config.size"),
    **_all("preprocess process_image fetch_images", "call the processor with the images"),
    **_all("resize center_crop", "crop(image) scales and crops"),
    **_all("rescale normalize convert_to_rgb pad", "call the processor, which does it"),
    **_all(
        """data_format device disable_grouping do_pad image_seq_length input_data_format pad_size
        return_tensors""",
        INSIDE_TRANSFORMERS,
    ),
    **_all("from_dict from_json_file get_image_processor_dict", "from_pretrained(folder) reads the settings"),
    **_all("apply_chat_template", "pipelines write their own template"),
    **_all("decode batch_decode", "`.tokenizer` has decode and batch_decode"),
    **_all(
        "parse_response post_process_image_text_to_text post_process_multimodal_output",
        "Qwen3-VL reads prompts here; it writes none",
    ),
    **_all(
        """all_special_multimodal_tokens audio_token_ids backend check_argument_for_proper_class
        create_mm_token_type_ids from_args_and_dict get_attributes get_possibly_dynamic_module
        get_processor_dict get_text_with_replacements image_token_ids model_input_names prepare_inputs_layout
        register_for_auto_class replace_audio_token replace_image_token replace_video_token
        return_mm_token_type_ids return_text_replacement_offsets skip_tensor_conversion text_kwargs
        unused_input_names valid_kwargs valid_processor_kwargs validate_init_kwargs validate_inputs
        video_token_ids videos_kwargs""",
        INSIDE_TRANSFORMERS,
    ),
}
