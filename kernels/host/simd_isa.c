/*
 * Compiled once for each instruction set, with KVG_SIMD_TABLE and KVG_SIMD_NAME
 * naming the build. Loops run over whole registers; the last, partial one goes
 * through a local copy where rows are not padded.
 */
#include "kernels/host/simd.h"
#include "kernels/host/vector.h"

#include <math.h>

_Static_assert(KVG_SIMD_PAD % LANES == 0, "padded rows are whole registers");

extern const struct kvg_simd KVG_SIMD_TABLE;

/* ---- conversions ---- */

static vfloat bf16_to_float(vhalf h)
{
	return (vfloat)(__builtin_convertvector(h, vuint) << 16);
}

static vhalf float_to_bf16(vfloat f)
{
	vuint u = (vuint)f;
	vuint rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;

	return __builtin_convertvector(v_pick(v_is_number(f), rounded, (u >> 16) | 0x40), vhalf);
}

#if LANES == 16
static vfloat f16_to_float(vhalf h)
{
	return (vfloat)_mm512_cvtph_ps((__m256i)h);
}

static vhalf float_to_f16(vfloat f)
{
	return (vhalf)_mm512_cvtps_ph((__m512)f, _MM_FROUND_TO_NEAREST_INT);
}
#else
/* Exponent and mantissa move into place, and a product with 2^112 corrects the bias, of denormals too. */
static vfloat f16_to_float(vhalf half)
{
	vuint h = __builtin_convertvector(half, vuint);
	vfloat magnitude = (vfloat)((h & 0x7fff) << 13) * 0x1p112f;
	vuint special = (vuint)((vint)(h & 0x7fff) >= 0x7c00) & 0x7f800000;

	return (vfloat)((vuint)magnitude | special | ((h & 0x8000) << 16));
}

/*
 * Normal results: rebias and round by carrying into the exponent. Denormal results (below 2^-14): adding 0.5 makes
 * the FPU round at the right bit.
 */
static vhalf float_to_f16(vfloat f)
{
	vuint u = (vuint)f & 0x7fffffff;
	vuint normal = (u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13;
	vuint small = (vuint)((vfloat)u + 0.5f) - 0x3f000000;
	vuint nan = 0x7e00 | ((u >> 13) & 0x3ff);
	vuint result = v_pick((vint)u < 0x38800000, small, normal);

	result = v_pick((vint)u >= 0x477ff000, (vuint){0} + 0x7c00, result);
	result = v_pick((vint)u > 0x7f800000, nan, result);
	return __builtin_convertvector(result | (((vuint)f >> 16) & 0x8000), vhalf);
}
#endif

static inline void load_halves(float *dst, const uint8_t *src, size_t count, vfloat (*convert)(vhalf))
{
	float last[LANES];
	vhalf h;
	size_t i;

	for (i = 0; i + LANES <= count; i += LANES) {
		memcpy(&h, src + 2 * i, sizeof(h));
		v_store(dst + i, convert(h));
	}
	if (i == count)
		return;
	memset(&h, 0, sizeof(h));
	memcpy(&h, src + 2 * i, 2 * (count - i));
	v_store(last, convert(h));
	memcpy(dst + i, last, sizeof(*dst) * (count - i));
}

static inline void store_halves(uint8_t *dst, const float *src, size_t count, vhalf (*convert)(vfloat))
{
	float last[LANES] = {0};
	vhalf h;
	size_t i;

	for (i = 0; i + LANES <= count; i += LANES) {
		h = convert(v_load(src + i));
		memcpy(dst + 2 * i, &h, sizeof(h));
	}
	if (i == count)
		return;
	memcpy(last, src + i, sizeof(*src) * (count - i));
	h = convert(v_load(last));
	memcpy(dst + 2 * i, &h, 2 * (count - i));
}

static void bf16_load(float *dst, const void *src, size_t count)
{
	load_halves(dst, src, count, bf16_to_float);
}

static void bf16_store(void *dst, const float *src, size_t count)
{
	store_halves(dst, src, count, float_to_bf16);
}

static void f16_load(float *dst, const void *src, size_t count)
{
	load_halves(dst, src, count, f16_to_float);
}

static void f16_store(void *dst, const float *src, size_t count)
{
	store_halves(dst, src, count, float_to_f16);
}

/* ---- gate: one tile row in each lane ---- */

/* 1 / RMS of a vector of d elements whose squares add up to sum. */
static vfloat inverse_rms(vfloat sum, uint32_t width)
{
	return 1.0f / v_sqrt(sum * (1.0f / (float)width) + 1e-6f);
}

/* k: normed keys times qk, d registers. Returns p of one query head. */
static vfloat gate_query(const struct kvg_simd_gate *gate, const float *column, size_t ld, const float *bq, float b,
	const float *base, const vfloat *k)
{
	vfloat q[KVG_SIMD_WIDTH_MAX], squares = {0}, dot = {0}, sum = {0};

	for (uint32_t i = 0; i < gate->width; i++) {
		q[i] = v_load(column + i * ld) + bq[i];
		squares += q[i] * q[i];
		dot += q[i] * k[i];
	}
	vfloat inverse = inverse_rms(squares, gate->width);
	vfloat z = dot * inverse + b;

	for (uint32_t s = 0; s < gate->sinks; s++, base += gate->width) {
		vfloat zs = {0};

		for (uint32_t i = 0; i < gate->width; i++)
			zs += q[i] * base[i];
		sum += v_exp(zs * inverse - z);
	}
	return 1.0f / (1.0f + sum * gate->sink_weight);
}

/* The mean of p over the group for one head and one register of rows; NaN becomes 0. */
static vfloat gate_head(const struct kvg_simd_gate *gate, uint32_t head, const float *columns, size_t ld)
{
	size_t width = gate->width, queries = gate->group * width, first = head * queries;
	const float *key = columns + (gate->heads * queries + head * width) * ld;
	vfloat k[KVG_SIMD_WIDTH_MAX], squares = {0}, sum = {0};

	for (size_t i = 0; i < width; i++) {
		k[i] = v_load(key + i * ld);
		squares += k[i] * k[i];
	}
	vfloat inverse = inverse_rms(squares, gate->width);

	for (size_t i = 0; i < width; i++)
		k[i] *= inverse * gate->qk[i];
	for (uint32_t g = 0; g < gate->group; g++)
		sum += gate_query(gate, columns + (first + g * width) * ld, ld, gate->bq + first + g * width,
			gate->b[head * gate->group + g], gate->base + (size_t)head * gate->sinks * width, k);
	sum *= 1.0f / (float)gate->group;
	return (vfloat)((vuint)v_is_number(sum) & (vuint)sum);
}

static void gate_rows(const struct kvg_simd_gate *gate, const float *columns, size_t ld, size_t rows, float *scores)
{
	for (uint32_t head = 0; head < gate->heads; head++)
		for (size_t row = 0; row < rows; row += LANES) {
			vfloat p = gate_head(gate, head, columns + row, ld);
			size_t n = rows - row < LANES ? rows - row : LANES;

			for (size_t i = 0; i < n; i++)
				scores[(row + i) * gate->heads + head] = p[i];
		}
}

/* ---- attention ---- */

static float softmax(float *row, size_t valid, size_t width, struct kvg_simd_softmax *state)
{
	size_t whole = (valid + LANES - 1) / LANES * LANES;
	vfloat largest = v_set(state->max), sum = {0};

	for (size_t i = valid; i < whole; i++)
		row[i] = -INFINITY;
	for (size_t i = 0; i < whole; i += LANES)
		largest = v_max(largest, v_load(row + i));
	float max = v_reduce_max(largest);
	float correction = expf(state->max - max);

	for (size_t i = 0; i < whole; i += LANES) {
		vfloat p = v_exp(v_load(row + i) - max);

		v_store(row + i, p);
		sum += p;
	}
	memset(row + whole, 0, sizeof(*row) * (width - whole));
	*state = (struct kvg_simd_softmax){max, state->sum * correction + v_reduce_add(sum)};
	return correction;
}

static void scale(float *row, size_t count, float by)
{
	for (size_t i = 0; i < count; i += LANES)
		v_store(row + i, v_load(row + i) * by);
}

static void dots_four(const float *a, const float *b, size_t dim, float *out)
{
	vfloat sum[4] = {{0}, {0}, {0}, {0}};

	for (size_t i = 0; i < dim; i += LANES) {
		vfloat x = v_load(a + i);

		for (size_t k = 0; k < 4; k++)
			sum[k] += x * v_load(b + k * dim + i);
	}
	_mm_storeu_ps(out, v_reduce_add4(sum[0], sum[1], sum[2], sum[3]));
}

static void dots(const float *a, size_t rows, const float *b, size_t keys, size_t dim, float *out, size_t ld)
{
	size_t k;

	for (k = 0; k + 4 <= keys; k += 4)
		for (size_t r = 0; r < rows; r++)
			dots_four(a + r * dim, b + k * dim, dim, out + r * ld + k);
	for (; k < keys; k++)
		for (size_t r = 0; r < rows; r++) {
			vfloat sum = {0};

			for (size_t i = 0; i < dim; i += LANES)
				sum += v_load(a + r * dim + i) * v_load(b + k * dim + i);
			out[r * ld + k] = v_reduce_add(sum);
		}
}

/* One row of mix() over two registers' width of dim. */
static void mix_pair(const float *p, const float *v, size_t keys, size_t dim, float *out)
{
	vfloat first = v_load(out), second = v_load(out + LANES);

	for (size_t k = 0; k < keys; k++, v += dim) {
		first += p[k] * v_load(v);
		second += p[k] * v_load(v + LANES);
	}
	v_store(out, first);
	v_store(out + LANES, second);
}

static void mix(const float *p, size_t rows, size_t ld, const float *v, size_t keys, size_t dim, float *out)
{
	for (size_t r = 0; r < rows; r++, p += ld, out += dim) {
		size_t i;

		for (i = 0; i + 2 * LANES <= dim; i += 2 * LANES)
			mix_pair(p, v + i, keys, dim, out + i);
		for (; i < dim; i += LANES) {
			vfloat sum = v_load(out + i);

			for (size_t k = 0; k < keys; k++)
				sum += p[k] * v_load(v + k * dim + i);
			v_store(out + i, sum);
		}
	}
}

/* ---- copies ---- */

#define REGISTER (4 * LANES) /* bytes */

#if LANES == 16
typedef __m512i line_part;
#elif LANES == 8
typedef __m256i line_part;
#else
typedef __m128i line_part;
#endif

static line_part load_part(const uint8_t *src)
{
#if LANES == 16
	return _mm512_loadu_si512(src);
#elif LANES == 8
	return _mm256_loadu_si256((const __m256i *)(const void *)src);
#else
	return _mm_loadu_si128((const __m128i *)(const void *)src);
#endif
}

static void stream_part(uint8_t *dst, line_part part)
{
#if LANES == 16
	_mm512_stream_si512((__m512i *)(void *)dst, part);
#elif LANES == 8
	_mm256_stream_si256((__m256i *)(void *)dst, part);
#else
	_mm_stream_si128((__m128i *)(void *)dst, part);
#endif
}

/* All is read before it is written: loads and stores that alternate line by line cost a tenth. */
static void stream_bytes(uint8_t *dst, const uint8_t *src, size_t size)
{
	line_part parts[KVG_SIMD_TURN / REGISTER];

	for (size_t i = 0; i < size / REGISTER; i++)
		parts[i] = load_part(src + i * REGISTER);
	for (size_t i = 0; i < size / REGISTER; i++)
		stream_part(dst + i * REGISTER, parts[i]);
}

static void streams(uint8_t *const *dst, const uint8_t *const *src, unsigned count, size_t size)
{
	size_t at = 0;

	for (; at + KVG_SIMD_TURN <= size; at += KVG_SIMD_TURN)
		for (unsigned i = 0; i < count; i++)
			stream_bytes(dst[i] + at, src[i] + at, KVG_SIMD_TURN);
	for (unsigned i = 0; i < count && at < size; i++)
		stream_bytes(dst[i] + at, src[i] + at, size - at);
}

const struct kvg_simd KVG_SIMD_TABLE = {
	.name = KVG_SIMD_NAME,
	.bf16_load = bf16_load,
	.bf16_store = bf16_store,
	.f16_load = f16_load,
	.f16_store = f16_store,
	.gate = gate_rows,
	.softmax = softmax,
	.scale = scale,
	.dots = dots,
	.mix = mix,
	.streams = streams,
};
