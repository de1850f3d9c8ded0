"""The tokenizer files of a model in Hugging Face's format."""

import json

from .base import Tokenizer


def hugging_face_files(tokenizer: Tokenizer, longest: int) -> dict[str, str]:
    """Returns the contents of tokenizer.json and tokenizer_config.json, by file name.

    transformers' AutoTokenizer then encodes as `tokenizer` does, and puts bos before a text unless it is called with
    `add_special_tokens=False`. bos is also the token that ends a text, and text that spells it does not encode to it.

    Args:
        longest: tokens of the longest sequence that the model accepts.

    Raises:
        CorpusError: `tokenizer` cannot be written as a tokenizer of the `tokenizers` library.
    """
    from tokenizers import decoders, processors

    library = tokenizer.to_library()
    bos = library.id_to_token(tokenizer.bos)
    library.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.bos)]
    )
    if '"ByteLevel"' in json.dumps(json.loads(library.to_str())["pre_tokenizer"]):  # others have their own decoder
        library.decoder = decoders.ByteLevel()
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": bos,
        "pad_token": bos,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return {
        "tokenizer.json": library.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
    }
