"A small language model, from the first softmax to an assistant that chats. `import tiny_llm` loads nothing heavy."
__version__ = "0.1.0"

import sys
from importlib import import_module
from types import ModuleType

# Where each public name lives. A module is imported when one of its names is first used.
_home = {name: module for module, names in {
    "basics":    "UserError check exercise figure pick_device",
    "math":      "bits_per_byte cross_entropy entropy perplexity softmax",
    "attention": "KVCache attention causal_mask document_mask",
    "tiles":     "attention_cost attention_entropy attention_weights tiled_attention",
    "rope":      "apply_rope rope_frequencies rope_table",
    "blocks":    "Attention Block MLP RMSNorm SwiGLU",
    "model":     "ModelConfig Transformer count_params counted_flops flops_per_token preset presets",
    "families":  "family from_hf to_hf",
    "weights":   "open_gguf open_llama2c",
    "stories":   "Story floor_shares stories",
    "judge":     "parse surprisals",
    "talk":      "conversations fulfilled",
    "tokenizer": "Tokenizer train_tokenizer",
    "bpe":       "BPE train_bpe",
    "playground": "playground",
    "sources":   "documents read",
    "clean":     "clean leak",
    "corpus":    "open_tokens tokenize",
    "card":      "data_card",
    "data":      "Batches pack",
    "folder":    "load save",
    "audit":     "audit",
    "optim":     "make_optimizer schedule",
    "run":       "Run",
    "train":     "evaluate_loss plan train",
    "evaluate":  "gap_by_kind",
    "generate":  "generate grade_stories stream",
    "finetune":  "finetune grade_chat",
    "chat":      "ChatSession chat",
}.items() for name in names.split()}
__all__ = sorted(_home)


class _Package(ModuleType):
    "`tl.train` is the function, whichever of `tl.train` and `from tiny_llm.train import …` comes first."
    def __setattr__(self, name, value):
        if _home.get(name) == name and isinstance(value, ModuleType): value = getattr(value, name, value)
        super().__setattr__(name, value)

sys.modules[__name__].__class__ = _Package


def __getattr__(name):
    if name not in _home: raise AttributeError(f"module 'tiny_llm' has no attribute {name!r}")
    value = getattr(import_module(f"tiny_llm.{_home[name]}"), name)
    globals()[name] = value
    return value


def __dir__(): return sorted({*globals(), *_home})
