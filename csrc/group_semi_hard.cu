// The CUDA kernel of syncmask::_group_walk, the steps of group_semi_hard between two makings of neighbor lists;
// kernels/group_semi_hard.py has the schema and the loop around it.
//
// One cooperative launch walks. The first warp of block 0 leads: it takes the first entry of the current item's list
// that is unvisited and allowed. Where the list has none, it posts a task, and all blocks, which wait for one, compare
// the item with every unvisited one. All other launches of a walk are those that make lists.
//
// Letters: R remaining items, D features (a multiple of 4), K neighbors. A place is the number of an item among them.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>

#include <cuda/atomic>
#include <cuda_runtime.h>

#include "walk_order.h"

namespace {

using namespace syncmask;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kWarp = 32;
constexpr int kThreads = 1024;  // of a block, one for each multiprocessor: 32 KiB of loads in flight
constexpr int kItems = 4;       // of a warp at a time
constexpr unsigned kAllLanes = 0xffffffffu;
// New lists are due when scans have cost as much as making them would. In similarities of scans, which come from
// memory: one of a list, where operands are reused; a scan beyond its similarities; launches.
constexpr int64_t kScanCost = 10, kScanOverhead = 1 << 14, kListsOverhead = 1 << 25;

// What the walk goes over. Written by the leader and read by all, so never through the read-only cache: unvisited,
// batch_of.
struct Walk {
  const float4* images;      // [R, D / 4]
  const float4* texts;       // [R, D / 4]
  const int32_t* of_image;   // [R, K] places, the best first; -1 ends a list
  const int32_t* of_text;    // [R, K]
  const int32_t* product;    // [R]
  const int64_t* item;       // [R]
  unsigned char* unvisited;  // [R]
  int64_t* batch_of;         // [products]: the last batch that holds the product
  int64_t* order;            // [n]
  int64_t* state;            // position, and the place that is to be put there
  int64_t remaining, width, neighbors, items, batch_size;
  float margin;
};

struct Task {
  int64_t place, batch;
  bool from_image, any_product, stop;
};

// In global memory, zero at first.
struct Board {
  Task task;
  unsigned long long best;
  unsigned posted;   // tasks so far
  unsigned arrived;  // blocks other than the leader's that are done with the task
};

using Counter = cuda::atomic_ref<unsigned, cuda::thread_scope_device>;

// sum[i] = a . b[i] for the i that `wanted` has a bit for, in every lane; one order of additions for all.
template <int kCount>
__device__ void dots(const float4* a, const float4* const (&b)[kCount], unsigned wanted, int64_t width, int lane,
                     float (&sum)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum[i] = 0.0f;
  for (int64_t d = lane; d < width; d += kWarp) {
    const float4 x = __ldg(a + d);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (wanted >> i & 1) {
        const float4 y = __ldg(b[i] + d);
        sum[i] = fmaf(x.x, y.x, sum[i]);
        sum[i] = fmaf(x.y, y.y, sum[i]);
        sum[i] = fmaf(x.z, y.z, sum[i]);
        sum[i] = fmaf(x.w, y.w, sum[i]);
      }
    }
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] += __shfl_xor_sync(kAllLanes, sum[i], offset);
  }
}

__device__ bool allows(const Walk& walk, const Task& task, int64_t place) {
  const int32_t product = walk.product[place];
  return task.any_product || (product != walk.product[task.place] && walk.batch_of[product] != task.batch);
}

// The best entry (walk_order.h) among this block's share of the unvisited items, in thread 0; 0 where there is none.
__device__ uint64_t scan(const Walk& walk, const Task& task) {
  __shared__ unsigned long long best_of_block;
  if (threadIdx.x == 0) best_of_block = 0;
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  const int64_t warp = static_cast<int64_t>(threadIdx.x / kWarp) * gridDim.x + blockIdx.x;
  const float4* query = (task.from_image ? walk.images : walk.texts) + task.place * walk.width;
  const float4* targets = task.from_image ? walk.texts : walk.images;
  int32_t threshold = kNoThreshold;
  if (!task.any_product) {
    const float4* const own_target[1] = {targets + task.place * walk.width};
    float own[1];
    dots<1>(query, own_target, 1, walk.width, lane, own);
    threshold = ordered_threshold(own[0], walk.margin);
  }
  uint64_t best = 0;
  for (int64_t first = warp * kItems; first < walk.remaining; first += warps * kItems) {
    unsigned wanted = 0;
    const float4* rows[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      rows[i] = targets + (first + i) * walk.width;
      if (first + i < walk.remaining && walk.unvisited[first + i]) wanted |= 1u << i;
    }
    if (wanted == 0) continue;
    float similarity[kItems];
    dots<kItems>(query, rows, wanted, walk.width, lane, similarity);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (!(wanted >> i & 1)) continue;
      const uint64_t entry = entry_of(key_of(ordered(similarity[i]), threshold), first + i);
      if (entry > best && allows(walk, task, first + i)) best = entry;
    }
  }
  if (lane == 0 && best != 0) atomicMax(&best_of_block, static_cast<unsigned long long>(best));
  __syncthreads();
  return best_of_block;
}

// Blocks other than the first: one scan for each task.
__device__ void follow(const Walk& walk, Board* board) {
  __shared__ Task shared_task;
  for (unsigned tasks = 0;; ++tasks) {
    if (threadIdx.x == 0) {
      while (Counter(board->posted).load(cuda::memory_order_acquire) == tasks) __nanosleep(64);
      shared_task = board->task;
    }
    __syncthreads();
    const Task task = shared_task;
    if (task.stop) return;
    const uint64_t best = scan(walk, task);  // its barriers keep shared_task until all have read it
    if (threadIdx.x == 0) {
      if (best != 0) atomicMax(&board->best, static_cast<unsigned long long>(best));
      Counter(board->arrived).fetch_add(1, cuda::memory_order_release);
    }
  }
}

// Only the first thread of block 0 may call it.
__device__ void post(Board* board, const Task& task) {
  board->task = task;
  board->best = 0;
  Counter(board->arrived).store(0, cuda::memory_order_relaxed);
  Counter(board->posted).fetch_add(1, cuda::memory_order_release);
}

// The place of the first entry of the list of `task.place` that may come next, in every lane of the warp; -1 for none.
__device__ int64_t next_in_list(const Walk& walk, const Task& task, int lane) {
  const int32_t* list = (task.from_image ? walk.of_image : walk.of_text) + task.place * walk.neighbors;
  for (int64_t begin = 0; begin < walk.neighbors; begin += kWarp) {
    const int32_t place = begin + lane < walk.neighbors ? list[begin + lane] : -1;
    const bool is_next = place >= 0 && walk.unvisited[place] && allows(walk, task, place);
    const unsigned ballot = __ballot_sync(kAllLanes, is_next);
    if (ballot != 0) return __shfl_sync(kAllLanes, place, __ffs(ballot) - 1);
  }
  return -1;
}

// Block 0: walks to the end, or until new lists are due.
__device__ void lead(const Walk& walk, Board* board) {
  __shared__ Task shared_task;
  __shared__ int64_t shared_place;
  const int lane = threadIdx.x % kWarp;
  const bool is_leader = threadIdx.x < kWarp;
  int64_t position = walk.state[0], scanned = 0;
  Task task{walk.state[1], 0, false, false, false};
  for (bool is_scanned = false;;) {
    if (is_leader) {
      if (is_scanned) {
        const int64_t left = walk.items - position;
        task.place = shared_place;
        task.any_product = false;
        task.stop = scanned * kScanCost > left * left + kListsOverhead;
      }
      while (!task.stop) {
        if (lane == 0) {
          walk.order[position] = walk.item[task.place];
          walk.unvisited[task.place] = 0;
          walk.batch_of[walk.product[task.place]] = position / walk.batch_size;
        }
        __syncwarp();
        ++position;
        task.stop = position == walk.items;
        if (task.stop) break;
        task.from_image = position % 2 == 1;
        task.batch = position / walk.batch_size;
        const int64_t next = next_in_list(walk, task, lane);
        if (next < 0) break;
        task.place = next;
      }
      if (lane == 0) shared_task = task;
    }
    __syncthreads();
    task = shared_task;
    if (task.stop) break;
    uint64_t best = 0;
    for (; best == 0; task.any_product = true) {  // where nothing is allowed, the highest
      if (threadIdx.x == 0) post(board, task);
      __syncthreads();
      best = scan(walk, task);
      scanned += walk.remaining + kScanOverhead;
      if (threadIdx.x == 0) {
        atomicMax(&board->best, static_cast<unsigned long long>(best));
        while (Counter(board->arrived).load(cuda::memory_order_acquire) != gridDim.x - 1) {
        }
        shared_place = static_cast<int64_t>(atomicMax(&board->best, 0ull));
      }
      __syncthreads();
      best = shared_place;
      __syncthreads();
    }
    if (threadIdx.x == 0) shared_place = place_of(best);
    __syncthreads();
    is_scanned = true;
  }
  if (threadIdx.x == 0) {
    walk.state[0] = position;
    walk.state[1] = task.place;
    post(board, task);
  }
}

__global__ void __launch_bounds__(kThreads) walk_kernel(Walk walk, Board* board) {
  if (blockIdx.x == 0) {
    lead(walk, board);
  } else {
    follow(walk, board);
  }
}

void check_cuda(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "group_semi_hard: ", cudaGetErrorString(error));
}

void check(const Tensor& x, ScalarType type, std::initializer_list<int64_t> sizes, const char* name) {
  bool is_right =
      x.is_cuda() && x.scalar_type() == type && x.is_contiguous() && x.dim() == static_cast<int64_t>(sizes.size());
  int64_t at = 0;
  for (const int64_t size : sizes) {
    is_right = is_right && x.size(at) == size;
    ++at;
  }
  STD_TORCH_CHECK(is_right, "group_semi_hard: ", name, " has a wrong shape, dtype, layout or device");
}

// images, texts float32 [R, D]; lists int32 [2, R, K]; product int32 [R]; item int64 [R]; unvisited bool [R], batch_of
// int64 [products], order int64 [n] and state int64 [2] are written.
void walk(Tensor images, Tensor texts, Tensor lists, Tensor product, Tensor item, Tensor unvisited, Tensor batch_of,
          Tensor order, Tensor state, int64_t batch_size, double margin) {
  const int64_t remaining = images.size(0), width = images.size(1), neighbors = lists.size(2);
  STD_TORCH_CHECK(remaining >= 1 && width % 4 == 0 && batch_size >= 1,
                  "group_semi_hard: nothing to walk, or D is no multiple of 4");
  STD_TORCH_CHECK(remaining <= INT32_MAX, "group_semi_hard: more than 2^31 items in one walk");
  check(images, ScalarType::Float, {remaining, width}, "images");
  check(texts, ScalarType::Float, {remaining, width}, "texts");
  check(lists, ScalarType::Int, {2, remaining, neighbors}, "lists");
  check(product, ScalarType::Int, {remaining}, "product");
  check(item, ScalarType::Long, {remaining}, "item");
  check(unvisited, ScalarType::Bool, {remaining}, "unvisited");
  check(batch_of, ScalarType::Long, {batch_of.size(0)}, "batch_of");
  check(order, ScalarType::Long, {order.size(0)}, "order");
  check(state, ScalarType::Long, {2}, "state");

  const int32_t device = images.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  Tensor board = torch::stable::new_zeros(state, {static_cast<int64_t>(sizeof(Board) / sizeof(int64_t) + 1)});

  Walk arguments;
  arguments.images = static_cast<const float4*>(images.const_data_ptr());
  arguments.texts = static_cast<const float4*>(texts.const_data_ptr());
  arguments.of_image = static_cast<const int32_t*>(lists.const_data_ptr());
  arguments.of_text = arguments.of_image + remaining * neighbors;
  arguments.product = static_cast<const int32_t*>(product.const_data_ptr());
  arguments.item = static_cast<const int64_t*>(item.const_data_ptr());
  arguments.unvisited = static_cast<unsigned char*>(unvisited.mutable_data_ptr());
  arguments.batch_of = static_cast<int64_t*>(batch_of.mutable_data_ptr());
  arguments.order = static_cast<int64_t*>(order.mutable_data_ptr());
  arguments.state = static_cast<int64_t*>(state.mutable_data_ptr());
  arguments.remaining = remaining;
  arguments.width = width / 4;
  arguments.neighbors = neighbors;
  arguments.items = order.size(0);
  arguments.batch_size = batch_size;
  arguments.margin = static_cast<float>(margin);

  int multiprocessors = 0, is_supported = 0;
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  check_cuda(cudaDeviceGetAttribute(&is_supported, cudaDevAttrCooperativeLaunch, device));
  STD_TORCH_CHECK(is_supported, "group_semi_hard: this device has no cooperative launch");
  const int64_t items_of_block = kThreads / kWarp * kItems;
  const int64_t blocks = std::min<int64_t>(multiprocessors, (remaining + items_of_block - 1) / items_of_block);
  Board* board_data = static_cast<Board*>(board.mutable_data_ptr());
  void* parameters[] = {&arguments, &board_data};
  check_cuda(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(walk_kernel), dim3(blocks), dim3(kThreads),
                                         parameters, 0, static_cast<cudaStream_t>(stream)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(syncmask, CUDA, m) { m.impl("_group_walk", TORCH_BOX(&walk)); }
