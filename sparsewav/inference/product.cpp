// The product of a batch of frames with a sparse matrix: outputs = inputs * weight^T + bias, float32.
//
// Frames are taken in tiles of TILE and turned around, so that what one column of the matrix reads lies in a row: a
// nonzero then costs two loads and TILE multiply-adds on whole vectors, wherever it stands in its row. The matrix is
// stored in blocks of columns, so that the slice of the tile that a block reads stays in the first-level cache.

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

constexpr int64_t TILE = 64;    // frames whose sums of one output are held in registers; kernel.py knows it too
constexpr int64_t SQUARE = 8;   // side of the squares in which tiles are turned around
constexpr int64_t CHUNK = 256;  // output rows of one task; their sums fit the second-level cache
constexpr int64_t VECTORS = TILE / LANES;

typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));

// target[j][i] = source[i][j] for a square; strides in floats.
inline void turn_square(const float* source, int64_t source_stride, float* target, int64_t target_stride) {
  float square[SQUARE][SQUARE];
  for (int64_t i = 0; i < SQUARE; i++)
    for (int64_t j = 0; j < SQUARE; j++) square[j][i] = source[i * source_stride + j];
  for (int64_t j = 0; j < SQUARE; j++) std::memcpy(target + j * target_stride, square[j], sizeof square[j]);
}

// (frames, cols) to (cols, TILE); frames past the end are zero.
void turn_tile(const float* inputs, int64_t frames, int64_t cols, float* tile) {
  const int64_t whole_frames = frames / SQUARE * SQUARE, whole_cols = cols / SQUARE * SQUARE;
  for (int64_t col = 0; col < whole_cols; col += SQUARE)
    for (int64_t frame = 0; frame < whole_frames; frame += SQUARE)
      turn_square(inputs + frame * cols + col, cols, tile + col * TILE + frame, TILE);
  for (int64_t col = 0; col < cols; col++)
    for (int64_t frame = col < whole_cols ? whole_frames : 0; frame < TILE; frame++)
      tile[col * TILE + frame] = frame < frames ? inputs[frame * cols + col] : 0.0f;
}

// (count, TILE) sums to (frames, rows) outputs, at the columns that `outputs` points to.
void turn_back(const float* sums, int64_t count, int64_t frames, float* outputs, int64_t rows) {
  const int64_t whole_frames = frames / SQUARE * SQUARE, whole_count = count / SQUARE * SQUARE;
  for (int64_t row = 0; row < whole_count; row += SQUARE)
    for (int64_t frame = 0; frame < whole_frames; frame += SQUARE)
      turn_square(sums + row * TILE + frame, TILE, outputs + frame * rows + row, rows);
  for (int64_t frame = 0; frame < frames; frame++)
    for (int64_t row = frame < whole_frames ? whole_count : 0; row < count; row++)
      outputs[frame * rows + row] = sums[row * TILE + frame];
}

}  // namespace

// inputs (frames, cols) and outputs (frames, rows) are contiguous; tiles has room for the frames rounded up to TILE,
// times cols. offsets (blocks * rows + 1) says where each row of each block of columns begins in columns and values.
extern "C" void sparsewav_product(const float* inputs, int64_t frames, int64_t rows, int64_t cols, int64_t blocks,
                                  const int32_t* offsets, const uint16_t* columns, const float* values,
                                  const float* bias, float* tiles, float* outputs, int threads) {
  const int64_t tile_count = (frames + TILE - 1) / TILE, chunk_count = (rows + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t tile = 0; tile < tile_count; tile++)
    turn_tile(inputs + tile * TILE * cols, std::min(TILE, frames - tile * TILE), cols, tiles + tile * TILE * cols);

#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t task = 0; task < tile_count * chunk_count; task++) {
    const int64_t tile = task / chunk_count, first = task % chunk_count * CHUNK;
    const int64_t count = std::min(CHUNK, rows - first);
    const float* turned = tiles + tile * TILE * cols;
    alignas(64) float sums[CHUNK * TILE];
    for (int64_t block = 0; block < blocks; block++)
      for (int64_t row = 0; row < count; row++) {
        Vector sum[VECTORS];
        if (block == 0)
          for (int64_t i = 0; i < VECTORS; i++) sum[i] = Vector{} + (bias ? bias[first + row] : 0.0f);
        else
          std::memcpy(sum, sums + row * TILE, sizeof sum);
        const int32_t* offset = offsets + block * rows + first + row;
        for (int32_t k = offset[0]; k < offset[1]; k++) {
          const float* input = turned + columns[k] * TILE;
          const float value = values[k];
          for (int64_t i = 0; i < VECTORS; i++) {
            Vector lanes;
            std::memcpy(&lanes, input + i * LANES, sizeof lanes);
            sum[i] += value * lanes;
          }
        }
        std::memcpy(sums + row * TILE, sum, sizeof sum);
      }
    const int64_t frames_here = std::min(TILE, frames - tile * TILE);
    turn_back(sums, count, frames_here, outputs + tile * TILE * rows + first, rows);
  }
}
