// Tile images: K and V in 8 bits, as the matrix units of Hopper want them in shared memory, written once per call and
// fetched by one bulk copy per visit. Arrays, scratch memory and the launch of the pass that writes them. Plain C++.
//
// An image is 128 keys of one KV head, 128 rows of 128 bytes, 16-byte piece p of row r at p ^ (r % 8). The keys of a
// sequence are cut from its first on, whatever pages they lie in; with mean correction the means of its blocks are cut
// likewise, 128 blocks to an image.
//   K: row t is key t, int8: (key - center) / scale. The center is a vector per sequence and KV head near the mean of
//      its keys. It drops out of the softmax, and the kernel gives it back to the LSE.
//   V: row d is column d of the values, e4m3, value / scale, transposed because products of 8-bit operands sum along
//      rows alone. The keys of each 32 stand in the order in which the kernel holds their weights: SlotOfKey.
// Rows and keys that don't exist are zeros. A scale is that of a whole image: its largest value becomes 127, or 448.
// For values that were FP8 it is a power of two times the cache's, so that the cache's own numbers are kept.
#ifndef FLASHPREFILL_CUDA_COMMON_ATTEND_IMAGES_H_
#define FLASHPREFILL_CUDA_COMMON_ATTEND_IMAGES_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/backend.h"
#include "cuda/common/means.h"

namespace flashprefill::cuda {

struct AttendArgs;

constexpr int kImageKeys = 128;
constexpr int kImageColumns = 128; // head dimensions are padded to these
constexpr int kImageBytes = kImageKeys * kImageColumns;

// What belongs to the image of the same number. Keys whose K (of a mean K or V) is infinite or no number have a bit,
// since int8 cannot say so: their scores are to become NaN.
struct alignas(32) ImageScale {
  float scale;
  uint32_t any_not_finite;              // whether there is one;
  uint32_t not_finite[kImageKeys / 32]; // word [t % 8 / 2], bit t / 8 * 2 + t % 2: of a lane's columns together
};

// Images of all KV heads, `rows` of them each; that of sequence b's keys from 128 i on is row MeanBase + i, as if they
// were means of blocks of 128 (or, for means, of 128 blocks). One more follows, of zeros.
struct ImageSet {
  uint8_t *k = nullptr, *v = nullptr;
  ImageScale *k_scale = nullptr, *v_scale = nullptr;
  int64_t rows = 0;

  static ImageSet Take(Workspace& workspace, const Problem& p, int64_t keys_each) {
    ImageSet set;
    set.rows = MeanRows(p, static_cast<int>(keys_each));
    const int64_t images = p.kv_heads * set.rows + 1;
    set.k = workspace.Take<uint8_t>(images * kImageBytes);
    set.v = workspace.Take<uint8_t>(images * kImageBytes);
    set.k_scale = workspace.Take<ImageScale>(images);
    set.v_scale = workspace.Take<ImageScale>(images);
    return set;
  }
};

struct Images {
  ImageSet keys;
  ImageSet means;           // rows 0: there is no correction
  float* centers = nullptr; // [batch, kv_heads, kImageColumns]

  static Images Take(Workspace& workspace, const Problem& p, int block_size, bool correction) {
    Images images;
    images.keys = ImageSet::Take(workspace, p, kImageKeys);
    if (correction) images.means = ImageSet::Take(workspace, p, int64_t{kImageKeys} * block_size);
    images.centers = workspace.Take<float>(int64_t{p.batch} * p.kv_heads * kImageColumns);
    return images;
  }
};

// Slot, in its row of V's image, of a key of the image: of each 32 keys lane t of four holds 2 t, 2 t + 1 and those 8,
// 16 and 24 further on, and gives its weights to the matrix units as columns 4 t to 4 t + 3, and those 16 further on.
FLASHPREFILL_HOST_DEVICE constexpr int SlotOfKey(int key) {
  return (key & ~15) | (key >> 1 & 3) << 2 | (key >> 3 & 1) << 1 | (key & 1);
}

// Byte of an image at a row and a column (or slot).
FLASHPREFILL_HOST_DEVICE constexpr int ImageOffset(int row, int column) {
  return row * kImageColumns + ((column >> 4 ^ (row & 7)) << 4) + (column & 15);
}

// Writes the images of K and V of every sequence, and with correction those of the means, which are there. args are
// p's. k and v are bf16 or fp16, read 16 bytes at a time; v_scale is given where V was FP8 (common/keys/key_copy.h).
// head_dim is at most kImageColumns. Hopper's (sm90/attend_8bit/images.cu).
cudaError_t LaunchImages(const AttendArgs& args, const Images& images, const Problem& p, cudaStream_t stream);

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_ATTEND_IMAGES_H_
