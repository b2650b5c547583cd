"""The text of attention from one new token to a paged cache of latents, in LLVM's intermediate representation.

Shapes: D sequences, L tokens of a context, W words of a latent (two elements each), N heads, R kv_lora_rank,
O qk_rope_head_dim.

Sixteen heads of one sequence, a head a lane. Tokens come in chunks that stay in the cache while they are read
twice, with the softmax that `model_shards.softmax_blocks` explains:

    queries [W, 16]        word by word, a matrix of 16 outputs for tile_ir's products
    scores [tokens, 16]    latent rows times the queries
    p                      exp(scale * (scores - largest)), sixteen heads in one register, rounded to bfloat16
    mixed [16, R]          each element of two latents times p of sixteen heads

Rows that are not bfloat16 are widened first, a chunk at a time, into memory that stands in for the cache: one block of
the chunk's tokens. Each sixteen heads widen for themselves, so that threads share them: with 128 heads on a Zen 4 that
is a tenth (int8) or a seventh (fp8) more than what attention to bfloat16 takes (benchmarks/NOTES.md).
"""

import struct

from model_shards.kernels.builder import EXP_COEFFICIENTS, LEAST
from model_shards.kernels.decode_parts import HEADS
from model_shards.kernels.instructions import Arithmetic, Instructions
from model_shards.kernels.product_ir import load_arguments, rows_ir
from model_shards.kernels.quantized_latents import WIDEN_ARGUMENTS
from model_shards.kernels.tile_ir import splat

# Queries are the matrix: one register of sixteen heads, and rows are tokens.
INSTRUCTIONS = Instructions(Arithmetic.DOT, lanes=HEADS, vectors=1, rows=8)
# Of 1152 bytes each: 295 KB, which stay in the second-level cache.
CHUNK_TOKENS = 256

# What a call is told, in this order: eight bytes each. It is of one piece (model_shards.kernels.decode_parts).
ARGUMENTS = (
    "latent_queries",  # address of bfloat16 [N, R]
    "rope_queries",  # address of the first head's O numbers, bfloat16
    "rope_head",  # bytes from head to head
    "heads",  # N, at most 16
    "cache",  # address of one layer's first row
    "words",  # W, of a row of bfloat16
    "block_size",  # tokens, at most CHUNK_TOKENS; an even number of them where rows are bfloat16
    "blocks",  # address of int64, numbers of the blocks
    "length",  # L
    "rank",  # R, a multiple of 16
    "scale",  # float32, as the lower four bytes
    "peaks",  # address of float32 [16], each head's largest score: written
    "totals",  # address of float32 [16], what sums are to be divided by: written
    "sums",  # address of float32 [16, R]: written
)
MAX_BLOCK_SIZE = CHUNK_TOKENS

_F = f"<{HEADS} x float>"
_I = f"<{HEADS} x i32>"
_B = f"<{2 * HEADS} x bfloat>"


def decode_ir(widen: str | None = None) -> str:
    """Defines `share` (model_shards.kernels.machine_code) of one piece.

    `widen` is the name of `share` of quantized_latents.widen; None: rows are bfloat16.
    """
    functions = [_exp(), _pack(), _scores(), _softmax(), _mix(), _rescale(), _sequence(widen is not None)]
    if widen is not None:
        functions.append(_widen(widen))
    return "\n".join([_DECLARATIONS, *rows_ir(INSTRUCTIONS), *functions])


def _splat(name: str, scalar: str, kind: str = "float") -> str:
    return splat(name, scalar, kind, HEADS)


def _words_of(name: str, low: str, high: str) -> str:
    """%name: two vectors of sixteen halves lane by lane in one word each."""
    return f"""
  %{name}_low = zext <{HEADS} x i16> {low} to {_I}
  %{name}_high = zext <{HEADS} x i16> {high} to {_I}
{_splat(f"{name}_half", "16", "i32")}
  %{name}_up = shl {_I} %{name}_high, %{name}_half
  %{name} = or {_I} %{name}_low, %{name}_up"""


_DECLARATIONS = f"""
declare {_F} @llvm.rint.v16f32({_F})
declare {_I} @llvm.fptosi.sat.v16i32.v16f32({_F})
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)"""


def _hex_float(value: float) -> str:
    """A float constant as LLVM reads it: the double of a float32, in hexadecimal."""
    single = struct.unpack("f", struct.pack("f", value))[0]
    return "0x" + struct.pack(">d", single).hex().upper()


def _exp() -> str:
    """exp(x) of x <= 0, as `Builder.exp` has it: below 2^-126 it stays there, which is nothing beside the largest, 1.
    What is not a number stays none."""
    lines = [
        f"define internal {_F} @exp({_F} %x) #0 alwaysinline {{",
        _splat("log2e", _hex_float(1.4426950408889634)),
        _splat("least", _hex_float(-126.0)),
        f"  %t0 = fmul {_F} %x, %log2e",
        f"  %low = fcmp olt {_F} %t0, %least",
        f"  %t = select <{HEADS} x i1> %low, {_F} %least, {_F} %t0",
        f"  %n = call {_F} @llvm.rint.v16f32({_F} %t)",
        f"  %f = fsub {_F} %t, %n",
        f"  %i = call {_I} @llvm.fptosi.sat.v16i32.v16f32({_F} %n)",
        _splat("bias", "127", "i32"),
        _splat("shift", "23", "i32"),
        f"  %e = add {_I} %i, %bias",
        f"  %b = shl {_I} %e, %shift",
        f"  %power = bitcast {_I} %b to {_F}",
    ]
    lines += [_splat(f"c{degree}", _hex_float(value)) for degree, value in enumerate(EXP_COEFFICIENTS)]
    last = len(EXP_COEFFICIENTS) - 1
    lines.append(f"  %p{last} = fadd {_F} %c{last}, zeroinitializer")
    lines += [
        f"  %p{degree} = call {_F} @llvm.fma.v16f32({_F} %p{degree + 1}, {_F} %f, {_F} %c{degree})"
        for degree in range(last - 1, -1, -1)
    ]
    lines += [f"  %y = fmul {_F} %p0, %power", f"  ret {_F} %y", "}"]
    return "\n".join(lines)


def _pack() -> str:
    """Words of up to sixteen heads that lie apart, into one column of [words, 16] each."""
    return f"""
define internal void @pack(ptr %from, i64 %head_bytes, i64 %heads, i64 %words, ptr %packed) #0 {{
entry:
  br label %head
head:
  %h = phi i64 [0, %entry], [%h_next, %head_done]
  %from_off = mul i64 %h, %head_bytes
  %from_head = getelementptr i8, ptr %from, i64 %from_off
  %column = getelementptr i32, ptr %packed, i64 %h
  br label %word
word:
  %w = phi i64 [0, %head], [%w_next, %word]
  %word_at = getelementptr i32, ptr %from_head, i64 %w
  %value = load i32, ptr %word_at, align 2
  %place = mul i64 %w, {HEADS}
  %to = getelementptr i32, ptr %column, i64 %place
  store i32 %value, ptr %to, align 4
  %w_next = add nuw i64 %w, 1
  %more = icmp ult i64 %w_next, %words
  br i1 %more, label %word, label %head_done
head_done:
  %h_next = add nuw i64 %h, 1
  %h_more = icmp ult i64 %h_next, %heads
  br i1 %h_more, label %head, label %done
done:
  ret void
}}"""


def _scores() -> str:
    """Of one chunk, block after block."""
    passed = "i64 %count, ptr %x, ptr %queries, ptr %out, i64 %words, i64 %row_bytes, i64 64"
    passed += ", ptr null" * 4
    return f"""
define internal void @scores(ptr %queries, i64 %cache, i64 %words, i64 %block_size, ptr %blocks, i64 %tokens,
                             ptr %scores) #0 {{
entry:
  %row_bytes = mul i64 %words, 4
  %block_bytes = mul i64 %row_bytes, %block_size
  br label %block
block:
  %b = phi i64 [0, %entry], [%b_next, %block]
  %first = phi i64 [0, %entry], [%end, %block]
  %full_end = add i64 %first, %block_size
  %is_last = icmp ugt i64 %full_end, %tokens
  %end = select i1 %is_last, i64 %tokens, i64 %full_end
  %count = sub i64 %end, %first
  %number_at = getelementptr i64, ptr %blocks, i64 %b
  %number = load i64, ptr %number_at
  %block_off = mul i64 %number, %block_bytes
  %block_i = add i64 %cache, %block_off
  %x = inttoptr i64 %block_i to ptr
  %out_off = mul i64 %first, 64
  %out = getelementptr i8, ptr %scores, i64 %out_off
  call void @rows({passed})
  %b_next = add i64 %b, 1
  %more = icmp ult i64 %end, %tokens
  br i1 %more, label %block, label %done
done:
  ret void
}}"""


def _softmax() -> str:
    """Of one chunk: scores become p, two tokens a word of bfloat16, without weight past the end.

    Returns by way of `state` [3, 16]: the largest score and the total so far, which are brought up to date, and what
    the former sums shrink by.
    """
    return f"""
define internal void @softmax(ptr %scores, i64 %tokens, ptr %state, float %scale) #0 {{
entry:
  %total_at = getelementptr i8, ptr %state, i64 64
  %shrink_at = getelementptr i8, ptr %state, i64 128
  %before = load {_F}, ptr %state, align 64
  %total_before = load {_F}, ptr %total_at, align 64
{_splat("scales", "%scale")}
  br label %largest
largest:
  %i = phi i64 [0, %entry], [%i_next, %largest]
  %m = phi {_F} [%before, %entry], [%m_next, %largest]
  %s_off = mul i64 %i, 64
  %s_at = getelementptr i8, ptr %scores, i64 %s_off
  %s = load {_F}, ptr %s_at, align 64
  %higher = fcmp ogt {_F} %s, %m
  %m_next = select <{HEADS} x i1> %higher, {_F} %s, {_F} %m
  %i_next = add nuw i64 %i, 1
  %i_more = icmp ult i64 %i_next, %tokens
  br i1 %i_more, label %largest, label %known
known:
  %fell = fsub {_F} %before, %m_next
  %fell_scaled = fmul {_F} %fell, %scales
  %shrink = call {_F} @exp({_F} %fell_scaled)
  store {_F} %m_next, ptr %state, align 64
  store {_F} %shrink, ptr %shrink_at, align 64
  br label %powers
powers:
  %j = phi i64 [0, %known], [%j_next, %powers]
  %sum = phi {_F} [zeroinitializer, %known], [%sum_next, %powers]
  %p_off = mul i64 %j, 64
  %p_at = getelementptr i8, ptr %scores, i64 %p_off
  %score = load {_F}, ptr %p_at, align 64
  %below = fsub {_F} %score, %m_next
  %below_scaled = fmul {_F} %below, %scales
  %p = call {_F} @exp({_F} %below_scaled)
  store {_F} %p, ptr %p_at, align 64
  %sum_next = fadd {_F} %sum, %p
  %j_next = add nuw i64 %j, 1
  %j_more = icmp ult i64 %j_next, %tokens
  br i1 %j_more, label %powers, label %done
done:
  %kept = fmul {_F} %total_before, %shrink
  %total = fadd {_F} %kept, %sum_next
  store {_F} %total, ptr %total_at, align 64
  br label %pair
pair:
  %t = phi i64 [0, %done], [%t_next, %pair]
  %first_off = mul i64 %t, 64
  %first_at = getelementptr i8, ptr %scores, i64 %first_off
  %first_p = load {_F}, ptr %first_at, align 64
  %t_second = add nuw i64 %t, 1
  %has_second = icmp ult i64 %t_second, %tokens
  %second_off = add i64 %first_off, 64
  %second_there = select i1 %has_second, i64 %second_off, i64 %first_off
  %second_at = getelementptr i8, ptr %scores, i64 %second_there
  %second_any = load {_F}, ptr %second_at, align 64
  %second_p = select i1 %has_second, {_F} %second_any, {_F} zeroinitializer
  %first_b = call <{HEADS} x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512({_F} %first_p)
  %second_b = call <{HEADS} x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512({_F} %second_p)
  %first_h = bitcast <{HEADS} x bfloat> %first_b to <{HEADS} x i16>
  %second_h = bitcast <{HEADS} x bfloat> %second_b to <{HEADS} x i16>
{_words_of("pair_words", "%first_h", "%second_h")}
  %words_off = mul i64 %t, 32
  %words_at = getelementptr i8, ptr %scores, i64 %words_off
  store {_I} %pair_words, ptr %words_at, align 64
  %t_next = add nuw i64 %t, 2
  %t_more = icmp ult i64 %t_next, %tokens
  br i1 %t_more, label %pair, label %out
out:
  ret void
}}"""


def _mix() -> str:
    """Adds one chunk to sixteen elements of the sums of each head: `sums` is head 0's, `head_bytes` apart."""
    heads = range(HEADS)
    loads = "\n".join(
        f"  %at_off{h} = mul i64 %head_bytes, {h}\n  %at{h} = getelementptr i8, ptr %sums, i64 %at_off{h}\n"
        f"  %begun{h} = load {_F}, ptr %at{h}, align 4"
        for h in heads
    )
    outer = "\n".join(f"  %o{h} = phi {_F} [%begun{h}, %entry], [%n{h}, %block_done]" for h in heads)
    inner = "\n".join(f"  %a{h} = phi {_F} [%o{h}, %block], [%n{h}, %row]" for h in heads)
    adds = "\n".join(
        f"  %p_at{h} = getelementptr i8, ptr %p_row, i64 {4 * h}\n  %p{h} = load i32, ptr %p_at{h}, align 4\n"
        + _splat(f"w{h}", f"%p{h}", "i32")
        + f"\n  %b{h} = bitcast {_I} %w{h} to {_B}"
        + f"\n  %n{h} = call {_F} @llvm.x86.avx512bf16.dpbf16ps.512({_F} %a{h}, {_B} %latents, {_B} %b{h})"
        for h in heads
    )
    stores = "\n".join(f"  store {_F} %n{h}, ptr %at{h}, align 4" for h in heads)
    return f"""
define internal void @mix(ptr %sums, i64 %head_bytes, i64 %cache, i64 %row_bytes, i64 %block_size, ptr %blocks,
                          i64 %tokens, ptr %scores) #0 {{
entry:
  %block_bytes = mul i64 %row_bytes, %block_size
{loads}
  br label %block
block:
  %b = phi i64 [0, %entry], [%b_next, %block_done]
  %first = phi i64 [0, %entry], [%end, %block_done]
{outer}
  %full_end = add i64 %first, %block_size
  %is_last = icmp ugt i64 %full_end, %tokens
  %end = select i1 %is_last, i64 %tokens, i64 %full_end
  %number_at = getelementptr i64, ptr %blocks, i64 %b
  %number = load i64, ptr %number_at
  %block_off = mul i64 %number, %block_bytes
  %block_i = add i64 %cache, %block_off
  br label %row
row:
  %token = phi i64 [%first, %block], [%token_next, %row]
  %x_i = phi i64 [%block_i, %block], [%x_next, %row]
{inner}
  %x = inttoptr i64 %x_i to ptr
  %second = add nuw i64 %token, 1
  %has_second = icmp ult i64 %second, %end
  %y_there = add i64 %x_i, %row_bytes
  %y_i = select i1 %has_second, i64 %y_there, i64 %x_i
  %y = inttoptr i64 %y_i to ptr
  %x_halves = load <{HEADS} x i16>, ptr %x, align 2
  %y_halves = load <{HEADS} x i16>, ptr %y, align 2
{_words_of("latent_words", "%x_halves", "%y_halves")}
  %latents = bitcast {_I} %latent_words to {_B}
  %p_off = mul i64 %token, 32
  %p_row = getelementptr i8, ptr %scores, i64 %p_off
{adds}
  %token_next = add nuw i64 %token, 2
  %x_next = add i64 %y_there, %row_bytes
  %row_more = icmp ult i64 %token_next, %end
  br i1 %row_more, label %row, label %block_done
block_done:
  %b_next = add i64 %b, 1
  %more = icmp ult i64 %end, %tokens
  br i1 %more, label %block, label %done
done:
{stores}
  ret void
}}"""


def _rescale() -> str:
    """Sums of each head, which lie together, times its factor."""
    return f"""
define internal void @rescale(ptr %sums, i64 %rank, ptr %factors) #0 {{
entry:
  br label %head
head:
  %h = phi i64 [0, %entry], [%h_next, %head_done]
  %factor_at = getelementptr float, ptr %factors, i64 %h
  %factor = load float, ptr %factor_at
{_splat("factors_of", "%factor")}
  %first = mul i64 %h, %rank
  %sums_of = getelementptr float, ptr %sums, i64 %first
  br label %part
part:
  %r = phi i64 [0, %head], [%r_next, %part]
  %at = getelementptr float, ptr %sums_of, i64 %r
  %value = load {_F}, ptr %at, align 4
  %scaled = fmul {_F} %value, %factors_of
  store {_F} %scaled, ptr %at, align 4
  %r_next = add nuw i64 %r, {HEADS}
  %more = icmp ult i64 %r_next, %rank
  br i1 %more, label %part, label %head_done
head_done:
  %h_next = add nuw i64 %h, 1
  %h_more = icmp ult i64 %h_next, {HEADS}
  br i1 %h_more, label %head, label %done
done:
  ret void
}}"""


def _widen(name: str) -> str:
    """Rows of one chunk to bfloat16, one after another."""
    told = {"tokens": "%tokens", "block_size": "%block_size", "blocks": "%blocks_i", "cache": "%cache", "out": "%out_i"}
    stores = "\n".join(
        f"  %at{index} = getelementptr i64, ptr %told, i64 {index}\n  store i64 {told[argument]}, ptr %at{index}"
        for index, argument in enumerate(WIDEN_ARGUMENTS)
    )
    return f"""
declare void @{name}(ptr, i64, i64)
define internal void @widen(i64 %cache, i64 %block_size, ptr %blocks, i64 %tokens, ptr %out) #0 {{
  %told = alloca [{len(WIDEN_ARGUMENTS)} x i64]
  %blocks_i = ptrtoint ptr %blocks to i64
  %out_i = ptrtoint ptr %out to i64
{stores}
  call void @{name}(ptr %told, i64 0, i64 1)
  ret void
}}"""


def _sequence(widens: bool) -> str:
    """Chunk after chunk."""
    least = _hex_float(LEAST)
    room, widening, read = "", "", ("i64 %cache", "i64 %block_size", "ptr %blocks_here")
    if widens:
        room = f"""
  %wide_words = mul i64 %words, {CHUNK_TOKENS}
  %wide = alloca i32, i64 %wide_words, align 64
  %wide_i = ptrtoint ptr %wide to i64
  %first_block = alloca i64
  store i64 0, ptr %first_block"""
        widening = "call void @widen(i64 %cache, i64 %block_size, ptr %blocks_here, i64 %tokens, ptr %wide)"
        read = ("i64 %wide_i", f"i64 {CHUNK_TOKENS}", "ptr %first_block")
    rows, block_size, blocks = read
    return f"""
define void @share(ptr %arguments, i64 %begin, i64 %step) #0 {{
entry:
{load_arguments(ARGUMENTS)}
  %scale_bits = trunc i64 %scale to i32
  %factor = bitcast i32 %scale_bits to float
  %latent_queries_p = inttoptr i64 %latent_queries to ptr
  %rope_queries_p = inttoptr i64 %rope_queries to ptr
  %blocks_p = inttoptr i64 %blocks to ptr
  %sums_p = inttoptr i64 %sums to ptr
  %peaks_p = inttoptr i64 %peaks to ptr
  %totals_p = inttoptr i64 %totals to ptr
  %scores = alloca [{CHUNK_TOKENS * HEADS} x float], align 64
  %state = alloca [{3 * HEADS} x float], align 64
  %packed_words = mul i64 %words, {HEADS}
  %queries = alloca i32, i64 %packed_words, align 64
{room}
  %total_at = getelementptr i8, ptr %state, i64 64
  %shrink_at = getelementptr i8, ptr %state, i64 128
{_splat("least", least)}
  store {_F} %least, ptr %state, align 64
  store {_F} zeroinitializer, ptr %total_at, align 64
  %row_bytes = mul i64 %words, 4
  %rank_words = udiv i64 %rank, 2
  %rope_words = sub i64 %words, %rank_words
  %latent_head = mul i64 %rank, 2
  %head_bytes = mul i64 %rank, 4
  %sums_bytes = mul i64 %head_bytes, {HEADS}
  %packed_bytes = mul i64 %packed_words, 4
  %rope_place = mul i64 %rank_words, {HEADS}
  %packed_rope = getelementptr i32, ptr %queries, i64 %rope_place
  call void @llvm.memset.p0.i64(ptr %queries, i8 0, i64 %packed_bytes, i1 false)
  call void @pack(ptr %latent_queries_p, i64 %latent_head, i64 %heads, i64 %rank_words, ptr %queries)
  call void @pack(ptr %rope_queries_p, i64 %rope_head, i64 %heads, i64 %rope_words, ptr %packed_rope)
  call void @llvm.memset.p0.i64(ptr %sums_p, i8 0, i64 %sums_bytes, i1 false)
  %chunk_blocks = udiv i64 {CHUNK_TOKENS}, %block_size
  %chunk = mul i64 %chunk_blocks, %block_size
  br label %chunks
chunks:
  %token = phi i64 [0, %entry], [%token_next, %chunk_done]
  %blocks_here = phi ptr [%blocks_p, %entry], [%blocks_next, %chunk_done]
  %left = sub i64 %length, %token
  %is_last = icmp ule i64 %left, %chunk
  %tokens = select i1 %is_last, i64 %left, i64 %chunk
  {widening}
  call void @scores(ptr %queries, {rows}, i64 %words, {block_size}, {blocks}, i64 %tokens, ptr %scores)
  call void @softmax(ptr %scores, i64 %tokens, ptr %state, float %factor)
  %is_first = icmp eq i64 %token, 0
  br i1 %is_first, label %mixing, label %shrinking
shrinking:
  call void @rescale(ptr %sums_p, i64 %rank, ptr %shrink_at)
  br label %mixing
mixing:
  br label %part
part:
  %r = phi i64 [0, %mixing], [%r_next, %part]
  %sums_here = getelementptr float, ptr %sums_p, i64 %r
  %column = mul i64 %r, 2
  %rows_here = add {rows}, %column
  call void @mix(ptr %sums_here, i64 %head_bytes, i64 %rows_here, i64 %row_bytes, {block_size}, {blocks},
                 i64 %tokens, ptr %scores)
  %r_next = add nuw i64 %r, {HEADS}
  %r_more = icmp ult i64 %r_next, %rank
  br i1 %r_more, label %part, label %chunk_done
chunk_done:
  %token_next = add nuw i64 %token, %chunk
  %blocks_next = getelementptr i64, ptr %blocks_here, i64 %chunk_blocks
  %more = icmp ult i64 %token_next, %length
  br i1 %more, label %chunks, label %finish
finish:
  %peak = load {_F}, ptr %state, align 64
  store {_F} %peak, ptr %peaks_p, align 4
  %total = load {_F}, ptr %total_at, align 64
  store {_F} %total, ptr %totals_p, align 4
  ret void
}}"""
