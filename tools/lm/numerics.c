#include "tools/lm/numerics.h"

#include <math.h>

void lm_rmsnorm(float *out, const float *x, const float *weight, size_t n, float eps)
{
	float sums[8] = {0}, sum = 0.0f, scale;
	size_t i = 0;

	for (; i + 8 <= n; i += 8)
		for (size_t j = 0; j < 8; j++)
			sums[j] += x[i + j] * x[i + j];
	for (; i < n; i++)
		sum += x[i] * x[i];
	for (size_t j = 0; j < 8; j++)
		sum += sums[j];
	scale = 1.0f / sqrtf(sum / (float)n + eps);
	for (i = 0; i < n; i++)
		out[i] = x[i] * scale * weight[i];
}

void lm_rope_table(float *cosines, float *sines, uint32_t pos, size_t count, size_t dim, double theta)
{
	size_t half = dim / 2;

	for (size_t i = 0; i < half; i++) {
		double frequency = pow(theta, -2.0 * (double)i / (double)dim);

		for (size_t t = 0; t < count; t++) {
			double angle = ((double)pos + (double)t) * frequency;

			cosines[t * half + i] = (float)cos(angle);
			sines[t * half + i] = (float)sin(angle);
		}
	}
}

void lm_rope(float *x, size_t dim, const float *cosines, const float *sines)
{
	size_t half = dim / 2;

	for (size_t i = 0; i < half; i++) {
		float a = x[i], b = x[i + half];

		x[i] = a * cosines[i] - b * sines[i];
		x[i + half] = b * cosines[i] + a * sines[i];
	}
}

void lm_silu_mul(float *gate, const float *up, size_t n)
{
	for (size_t i = 0; i < n; i++)
		gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

size_t lm_argmax(const float *x, size_t n)
{
	size_t best = 0;

	for (size_t i = 1; i < n; i++)
		if (x[i] > x[best] || isnan(x[best]))
			best = i;
	return best;
}

float lm_max_difference(const float *a, const float *b, size_t n)
{
	float max = 0.0f;

	for (size_t i = 0; i < n; i++) {
		float difference = fabsf(a[i] - b[i]);

		if (isnan(difference))
			return INFINITY;
		if (difference > max)
			max = difference;
	}
	return max;
}
