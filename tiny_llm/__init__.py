"A small language model, from the first softmax to an assistant that chats. `import tiny_llm` loads nothing heavy."
__version__ = "0.1.0"

from importlib import import_module

# Where each public name lives. A module is imported when one of its names is first used.
_home = {name: module for module, names in {
    "basics":                   "UserError check exercise figure pick_device",
    "transformer.math":         "bits_per_byte cross_entropy entropy perplexity softmax",
    "transformer.attention":    "KVCache attention causal_mask document_mask",
    "transformer.flash":        "attention_cost attention_entropy attention_weights tiled_attention",
    "transformer.rope":         "apply_rope rope_frequencies rope_table",
    "transformer.blocks":       "Attention Block MLP RMSNorm SwiGLU",
    "transformer.model":        "ModelConfig Transformer preset presets",
    "transformer.sizes":        "count_params counted_flops flops_per_token",
    "transformer.huggingface":  "family from_hf to_hf",
    "transformer.gguf":         "from_gguf from_llama2c",
    "transformer.packed":       "PackedLinear PackedTransformer packed_gguf",
    "transformer.graph":        "Graph OnnxSession onnx_graph",
    "transformer.adapters":     "add_adapter delete_adapter list_adapters load_adapter merge_adapter save_adapter set_adapter",
    "text.stories":             "Story floor_shares stories",
    "text.judge":               "parse surprisals",
    "text.dialogues":           "conversations fulfilled",
    "text.tokenizer":           "Tokenizer train_tokenizer char_tokenizer",
    "text.bpe":                 "BPE train_bpe",
    "text.playground":          "playground",
    "text.sources":             "documents read",
    "text.cleaning":            "clean data_card leak",
    "text.corpus":              "open_tokens tokenize",
    "text.batches":             "Batches pack",
    "text.large_corpora":       "LargeBatches TextStream",
    "training.folder":          "load open_gguf open_llama2c save",
    "training.audit":           "audit",
    "training.code":            "confinement run_program run_programs",
    "training.real_text":       "ByteCounts byte_bits compressed_bits copied longest_match loss_by_kind_of_code parses",
    "training.improvements":    "lr_range_test gradient_noise noise_scale",
    "training.doctor":          "doctor doctor_callback",
    "training.tune":            "tune",
    "training.optim":           "make_optimizer schedule",
    "training.config":          "TrainConfig",
    "training.run":             "Run",
    "training.train":           "evaluate_loss train",
    "training.evaluate":        "gap_by_kind",
    "training.plan":            "forecast on_gpus plan",
    "training.scale":           "Group on_paper tensor_parallel",
    "training.watch":           "LivePlot tracker",
    "training.benchmarks":      "benchmark blimp lambada paired text_loss",
    "training.xray":            "xray",
    "training.code_suite":      "code_benchmark code_suite compare_suites pass_at_k text_overlap",
    "training.code_tasks":      "CodeReward code_tasks",
    "assistant.generate":       "generate generate_batch grade_stories stream",
    "assistant.finetune":       "finetune grade_chat",
    "assistant.lora":           "use_adapter",
    "assistant.reinforce":      "align reinforce",
    "assistant.preference":     "Reward fit_reward prefer read_pairs story_pairs",
    "assistant.chat":           "ChatSession",
    "assistant.pipeline":       "pipeline",
    "assistant.decoding":       "beam_search speculate",
    "assistant.cell":           "chat",
    "assistant.engine":         "Engine",
    "assistant.protocol":       "Refusal make_job whole_answer",
    "deployment.quantize":      "kept_bytes quantize",
    "deployment.serve":         "make_app serve",
    "deployment.export":        "export passport push write_gguf write_hub_folder write_onnx",
}.items() for name in names.split()}
__all__ = sorted(_home)


def __getattr__(name):
    if name in ("transformer", "text", "training", "assistant", "deployment"): return import_module(f"tiny_llm.{name}")
    if name not in _home: raise AttributeError(f"module 'tiny_llm' has no attribute {name!r}")
    value = getattr(import_module(f"tiny_llm.{_home[name]}"), name)
    globals()[name] = value
    return value


def __dir__(): return sorted({*globals(), *_home})
