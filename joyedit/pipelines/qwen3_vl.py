"""Qwen3-VL by itself: questions about pictures, answered in words.

A folder of Qwen3-VL has one network; of a JoyAI-Image checkpoint it takes the text encoder, and reads nothing
of the transformer and the autoencoder.
"""

from collections.abc import Sequence

from joyedit.models.qwen3_vl import Qwen3VLForConditionalGeneration
from joyedit.pipelines import questions
from joyedit.pipelines.pipeline import Pipeline
from joyedit.text.qwen2_tokenizer import Qwen2Tokenizer
from joyedit.text.qwen3_vl_processor import Qwen3VLProcessor


class Qwen3VLPipeline(Pipeline):
    """Answer questions about pictures.

    Parts: `text_encoder`, `tokenizer`, `processor`. `Qwen3VLPipeline.from_pipe(pipe)` shares those of a
    JoyAI-Image pipeline, which has `ask` itself.
    """

    parts = {
        "text_encoder": (Qwen3VLForConditionalGeneration,),
        "tokenizer": (Qwen2Tokenizer,),
        "processor": (Qwen3VLProcessor,),
    }
    relatives = frozenset({"JoyImageEditPipeline", "JoyImageEditPlusPipeline"})
    ask = questions.ask

    def __init__(
        self,
        text_encoder: Qwen3VLForConditionalGeneration,
        tokenizer: Qwen2Tokenizer,
        processor: Qwen3VLProcessor,
        reference_quirks: bool | Sequence[str] = False,
    ):
        super().__init__(reference_quirks)
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.processor = processor
