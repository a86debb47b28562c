"""The tokenizer and chat template in transformers' own files, for programs that know nothing of ChatGLM3.

It gives the ids of `ChatGLM3Tokenizer`, but for one thing that a text format cannot keep apart: control tokens that
stand in a text (`<|user|>`, `[gMASK]`, and `sop`, `eop` as whole words) are read as control tokens, unless the program
asks for `split_special_tokens=True`.
"""

from __future__ import annotations

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from glmft.models.tokenizer import CONTROL_TOKENS, TOOLS_PROMPT, ChatGLM3Tokenizer

BOUNDARY = "\u2581"
PREFIX = ("[gMASK]", "sop")  # of a text that is encoded with special tokens, as the published tokenizer has it
WORDS = ("sop", "eop")  # control tokens that are also parts of words
TEMPLATE = """\
{{- '[gMASK]sop' -}}
{%- set ns = namespace(tools=[]) -%}
{%- for tool in tools or [] -%}{%- set ns.tools = ns.tools + [tool.function or tool] -%}{%- endfor -%}
{%- if ns.tools and messages[0].role != 'system' -%}
{{- '<|system|>\\n SYSTEM\\n' + (ns.tools | tojson(indent=4)) -}}
{%- endif -%}
{%- for message in messages -%}
{%- set role = 'observation' if message.role == 'tool' else message.role -%}
{%- set own = message.tools or (ns.tools if loop.first and role == 'system' else []) -%}
{%- set content = (message.content or '') + ('\\n' + (own | tojson(indent=4)) if own else '') -%}
{{- '<|' + role + '|>' + (message.metadata or '') + '\\n' + (' ' + content if content else '') -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
""".replace("SYSTEM", TOOLS_PROMPT)


def merges_of(sp: SentencePieceProcessor) -> list[tuple[str, str]]:
    """What a SentencePiece BPE model may merge: every way to make a piece of two others, best pieces first."""
    ids = range(sp.vocab_size())
    usual = [i for i in ids if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i) or sp.is_unused(i))]
    known = {sp.id_to_piece(i): i for i in usual}
    found = []
    for piece, i in known.items():
        for at in range(1, len(piece)):
            left, right = known.get(piece[:at]), known.get(piece[at:])
            if left is not None and right is not None:
                found.append((-sp.get_score(i), left, right))
    pieces = {i: piece for piece, i in known.items()}
    return [(pieces[left], pieces[right]) for _, left, right in sorted(found)]


def fast_tokenizer(tokenizer: ChatGLM3Tokenizer, max_length: int) -> PreTrainedTokenizerFast:
    """The same vocabulary as a `tokenizers` BPE, with the chat template; `max_length` tokens are read at most."""
    sp = tokenizer.sp
    vocabulary = {sp.id_to_piece(i): i for i in range(tokenizer.num_pieces)}
    unknown, end = sp.id_to_piece(tokenizer.pad_id), sp.id_to_piece(tokenizer.eos_id)
    inner = Tokenizer(BPE(vocabulary, merges_of(sp), unk_token=unknown, fuse_unk=True, byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend(BOUNDARY), normalizers.Replace(" ", BOUNDARY)])
    inner.decoder = decoders.Sequence(
        [decoders.Replace(BOUNDARY, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(
        [AddedToken(name, normalized=False, special=True, single_word=name in WORDS) for name in CONTROL_TOKENS]
    )
    prefix = [(name, tokenizer.control_ids[name]) for name in PREFIX]
    opening = " ".join(PREFIX)
    inner.post_processor = processors.TemplateProcessing(f"{opening} $A", f"{opening} $A $B", prefix)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=PREFIX[0],
        unk_token=unknown,
        pad_token=unknown,
        eos_token=end,
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE,
    )
