// The product of a batch of frames with a sparse matrix: outputs = inputs * weight^T + bias, float32; and the convolution
// with a sparse weight, which is the product of its unfolded input.
//
// Frames are taken in tiles of TILE and turned around, so that what one column of the matrix reads lies in a row: a
// nonzero then costs two loads and TILE multiply-adds on whole vectors, wherever it stands in its row. The matrix is
// stored in blocks of columns, so that the slice of the tile that a block reads stays in the first-level cache. Of a
// convolution a tile is unfolded right before it is multiplied, which costs little and needs memory for a tile alone.

#include <algorithm>
#include <atomic>
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

// (frames, cols) to (cols, TILE); frames past the end are zero. step is the distance of two frames, line of two columns
// in the tile, in floats.
void turn_tile(const float* inputs, int64_t step, int64_t frames, int64_t cols, float* tile, int64_t line) {
  const int64_t whole_frames = frames / SQUARE * SQUARE, whole_cols = cols / SQUARE * SQUARE;
  for (int64_t col = 0; col < whole_cols; col += SQUARE)
    for (int64_t frame = 0; frame < whole_frames; frame += SQUARE)
      turn_square(inputs + frame * step + col, step, tile + col * line + frame, line);
  for (int64_t col = 0; col < cols; col++)
    for (int64_t frame = col < whole_cols ? whole_frames : 0; frame < TILE; frame++)
      tile[col * line + frame] = frame < frames ? inputs[frame * step + col] : 0.0f;
}

// Every stride-th of a row of inputs; frames past the end are zero.
inline void take_frames(const float* inputs, int64_t stride, int64_t frames, float* tile) {
  if (frames == TILE && stride == 2)  // the usual stride, known to the compiler
    for (int64_t frame = 0; frame < TILE; frame++) tile[frame] = inputs[frame * 2];
  else
    for (int64_t frame = 0; frame < TILE; frame++) tile[frame] = frame < frames ? inputs[frame * stride] : 0.0f;
}

struct Weight {  // as the functions below describe it
  int64_t rows, blocks;
  const int32_t* offsets;
  const uint16_t* columns;
  const float *values, *bias;
};

// (cols, TILE) to sums (count, TILE) of count rows from the first on.
void multiply_tile(const float* tile, const Weight& weight, int64_t first, int64_t count, float* sums) {
  for (int64_t block = 0; block < weight.blocks; block++)
    for (int64_t row = 0; row < count; row++) {
      Vector sum[VECTORS];
      if (block == 0)
        for (int64_t i = 0; i < VECTORS; i++) sum[i] = Vector{} + (weight.bias ? weight.bias[first + row] : 0.0f);
      else
        std::memcpy(sum, sums + row * TILE, sizeof sum);
      const int32_t* offset = weight.offsets + block * weight.rows + first + row;
      for (int32_t k = offset[0]; k < offset[1]; k++) {
        const float* input = tile + weight.columns[k] * TILE;
        const float value = weight.values[k];
        for (int64_t i = 0; i < VECTORS; i++) {
          Vector lanes;
          std::memcpy(&lanes, input + i * LANES, sizeof lanes);
          sum[i] += value * lanes;
        }
      }
      std::memcpy(sums + row * TILE, sum, sizeof sum);
    }
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
  const Weight weight{rows, blocks, offsets, columns, values, bias};
  const int64_t tile_count = (frames + TILE - 1) / TILE, chunk_count = (rows + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t tile = 0; tile < tile_count; tile++)
    turn_tile(inputs + tile * TILE * cols, cols, std::min(TILE, frames - tile * TILE), cols, tiles + tile * TILE * cols,
              TILE);

#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t task = 0; task < tile_count * chunk_count; task++) {
    const int64_t tile = task / chunk_count, first = task % chunk_count * CHUNK;
    const int64_t count = std::min(CHUNK, rows - first);
    alignas(64) float sums[CHUNK * TILE];
    multiply_tile(tiles + tile * TILE * cols, weight, first, count, sums);
    const int64_t frames_here = std::min(TILE, frames - tile * TILE);
    turn_back(sums, count, frames_here, outputs + tile * TILE * rows + first, rows);
  }
}

// inputs are (batch, channels, length), outputs (batch, rows, frames), contiguous; with frame_major they are (batch,
// length, channels) and (batch, frames, rows). There are frames = (length - kernel) / stride + 1, at least one. A column
// of the weight is channel * kernel + tap. tiles has room for TILE * channels * kernel floats for every thread.
extern "C" void sparsewav_convolution(const float* inputs, int64_t batch, int64_t channels, int64_t length,
                                      int64_t kernel, int64_t stride, int64_t frame_major, int64_t rows, int64_t blocks,
                                      const int32_t* offsets, const uint16_t* columns, const float* values,
                                      const float* bias, float* tiles, float* outputs, int threads) {
  const Weight weight{rows, blocks, offsets, columns, values, bias};
  const int64_t frames = (length - kernel) / stride + 1;
  const int64_t tile_count = (frames + TILE - 1) / TILE, chunk_count = (rows + CHUNK - 1) / CHUNK;
  const int64_t task_count = batch * tile_count * chunk_count;
  // Threads take all rows of a tile at once, unless tiles are too few for all threads to end at the same time.
  const int64_t grain = batch * tile_count >= 4 * threads ? chunk_count : 1;
  std::atomic<int64_t> next{0};
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int thread = 0; thread < threads; thread++) {
    float* tile = tiles + thread * channels * kernel * TILE;
    alignas(64) float sums[CHUNK * TILE];
    int64_t held = -1;
    for (int64_t begin = next.fetch_add(grain); begin < task_count; begin = next.fetch_add(grain))
      for (int64_t task = begin; task < begin + grain; task++) {
        const int64_t place = task / chunk_count, utterance = place / tile_count;
        const int64_t start = place % tile_count * TILE, frames_here = std::min(TILE, frames - start);
        const float* input = inputs + utterance * channels * length;
        if (place != held && frame_major)
          for (int64_t tap = 0; tap < kernel; tap++)
            turn_tile(input + (start * stride + tap) * channels, stride * channels, frames_here, channels,
                      tile + tap * TILE, kernel * TILE);
        else if (place != held)
          for (int64_t channel = 0; channel < channels; channel++)
            for (int64_t tap = 0; tap < kernel; tap++)
              take_frames(input + channel * length + start * stride + tap, stride, frames_here,
                          tile + (channel * kernel + tap) * TILE);
        held = place;
        const int64_t first = task % chunk_count * CHUNK, count = std::min(CHUNK, rows - first);
        multiply_tile(tile, weight, first, count, sums);
        float* output = outputs + utterance * rows * frames;
        if (frame_major)
          turn_back(sums, count, frames_here, output + start * rows + first, rows);
        else
          for (int64_t row = 0; row < count; row++)
            std::memcpy(output + (first + row) * frames + start, sums + row * TILE, frames_here * sizeof(float));
      }
  }
}
