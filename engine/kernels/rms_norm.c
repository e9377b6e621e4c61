// RMS norm of rows in bf16. The torch definition, and how it is called, stand in rms_norm.py.

#include "simd.h"

// x, y [rows width], w [width], all bf16. work holds 2 * width floats.
void rms_norm(const uint16_t *x, const uint16_t *w, long rows, long width, float eps, float *work, uint16_t *y) {
  float *row = work, *weight = work + width;
  widen(w, width, 1, weight);
  for (long n = 0; n < rows; n++) {
    vec squares = {};
    float sum[4];
    widen(x + n * width, width, 1, row);
    for (long i = 0; i < width; i += LANES) squares += load(row + i) * load(row + i);
    sum4(squares, squares, squares, squares, sum);
    float scale = 1 / __builtin_sqrtf(sum[0] / width + eps);
    for (long i = 0; i < width; i++) row[i] *= scale;
    narrow(row, width, 1, y + n * width);  // as transformers rounds: before the weight, and after it
    widen(y + n * width, width, 1, row);
    for (long i = 0; i < width; i++) row[i] *= weight[i];
    narrow(row, width, 1, y + n * width);
  }
}
