"""Data: texts, labelled texts, images and synthetic tasks as grain pipelines of NumPy batches.

Every data object is a frozen dataclass with
  - ``train(tokenizer, batch_size, seed=0, shard=(i, n))``: a ``grain.IterDataset`` of shuffled
    batches, endless unless ``epochs`` is set. ``batch_size`` is global; shard i of n gives
    ``batch_size / n`` rows, and together the shards give the same global batches for every n
    (except ``TextData(lazy=True)``, where each process packs documents of its own).
    ``get_state`` and ``set_state`` of its iterator resume bit-exactly.
  - ``evaluation(tokenizer, batch_size, max_batches=None, shard=(i, n))``: a ``grain.MapDataset``
    of batches with a length; every example counts exactly once, the last batch is filled up with
    rows of weight zero.
Data without text take ``tokenizer=None``.

Batch schema (B rows of this shard, T tokens):

    language models      tokens, targets, positions, segment_ids   int32   [B, T]
    (TextData,           loss_mask                                 float32 [B, T]
    SequenceTask,
    ImageNames)          example (ImageNames alone)                float32 [B, P, d]
    labelled text        tokens, mask, token_types                 int32   [B, T]
    (ClassificationData) label                                     int32   [B]
                         weight                                    float32 [B]
    images               image                                     float32 [B, H, W, C]
    (ImageData)          label, weight                             int32, float32 [B]
    regression           x, y                                      float32 [B, ...]
    (TeacherStudent,     weight                                    float32 [B]
    ConvTeacherStudent,
    Sine, Series)

In a language-model batch ``targets[b, t]`` is the token after ``tokens[b, t]`` in the same
document; ``loss_mask`` is 0 where there is none, on padding, and on targets that belong to a
prompt. ``segment_ids`` are 1, 2, ... for the pieces of documents in a row, 0 for padding and -1
for the virtual tokens of a trained prompt, which every segment sees (:func:`with_prompt`);
``positions`` restart at 0 in every segment.
"""

from flora_jax.data.classification import LABELLED, ClassificationData
from flora_jax.data.conv_teacher import ConvTeacherStudent
from flora_jax.data.corpora import CORPORA, Corpus, load_corpus
from flora_jax.data.documents import Document, Fields
from flora_jax.data.encoding import Tokenizer
from flora_jax.data.image_names import ImageNames
from flora_jax.data.images import IMAGE_SETS, ImageData
from flora_jax.data.packing import PACKINGS, TOO_LONG, Tokenised, assemble, plan_rows
from flora_jax.data.sequences import SequenceTask
from flora_jax.data.series import Series
from flora_jax.data.synthetic import Sine, TeacherStudent
from flora_jax.data.text import TextData
from flora_jax.data.virtual import with_prompt

__all__ = [
    "CORPORA",
    "IMAGE_SETS",
    "LABELLED",
    "PACKINGS",
    "TOO_LONG",
    "ClassificationData",
    "ConvTeacherStudent",
    "Corpus",
    "Document",
    "Fields",
    "ImageData",
    "ImageNames",
    "SequenceTask",
    "Series",
    "Sine",
    "TeacherStudent",
    "TextData",
    "Tokenised",
    "Tokenizer",
    "assemble",
    "load_corpus",
    "plan_rows",
    "with_prompt",
]
