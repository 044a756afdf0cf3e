// The kernels as a package of AOTInductor calls them: C functions `aoti_torch_cpu_<operator>` on handles of tensors.
//
// They are linked into the package, with the kernels themselves, so that it runs without bevfn. Their declarations are read from
// here (`aoti.py`); arguments follow the operators' schemas, a list is a pointer and its length, results are handles that the
// caller owns. What is wrong is thrown: the package's caller gets the error.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <initializer_list>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

extern "C" {
int64_t sparse_conv(const float* x, const float* w, const int64_t* w_stride, const int32_t* table, int64_t K, int64_t V,
                    int64_t W, int64_t channels_in, int64_t channels_out, float* y, int64_t threads);
int64_t submanifold(const int32_t* coords, const uint8_t* valid, int64_t V, const int64_t* kernel, const int64_t* grid,
                    int32_t* table, int64_t threads);
int64_t strided(const int32_t* coords, const uint8_t* valid, int64_t V, const int64_t* kernel, const int64_t* stride,
                const int64_t* padding, const int64_t* grid, const int64_t* out_grid, int64_t W, int64_t batch,
                int32_t* out_coords, uint8_t* out_valid, int32_t* table, int32_t* inverse, int32_t* found, int64_t threads);
int64_t voxelize(const float* points, const uint8_t* valid, int64_t B, int64_t P, int64_t C, const float* lower,
                 const float* size, const int64_t* grid, int64_t max_points, int64_t V, float* features, int32_t* coords,
                 int32_t* count, int32_t* found, int64_t threads);
int64_t voxel_pool_forward(const float* depth, const float* context, const int32_t* cell, float* out, int64_t M, int64_t D,
                           int64_t H, int64_t W, int64_t C, int64_t cells, int64_t threads);
int64_t deform_attn_forward_float(const float* value, const float* locations, const float* weights, const bool* mask,
                                  float* out, const int64_t* numbers, int64_t threads);
}

namespace {

void check(AOTITorchError code) {
    if (code != AOTI_TORCH_SUCCESS) throw std::runtime_error("bevfn's kernels: libtorch refused a call");
}

int64_t size(AtenTensorHandle tensor, int64_t d) {
    int64_t n = 0;
    check(aoti_torch_get_size(tensor, d, &n));
    return n;
}

int32_t type(const float*) { return aoti_torch_dtype_float32(); }
int32_t type(const int32_t*) { return aoti_torch_dtype_int32(); }
int32_t type(const uint8_t*) { return aoti_torch_dtype_bool(); }

template <class T>
T* data(AtenTensorHandle tensor) {
    bool contiguous = false;
    int32_t dtype = 0;
    void* first = nullptr;
    check(aoti_torch_is_contiguous(tensor, &contiguous));
    check(aoti_torch_get_dtype(tensor, &dtype));
    check(aoti_torch_get_data_ptr(tensor, &first));
    if (!contiguous || dtype != type(static_cast<T*>(first)))
        throw std::runtime_error("bevfn's kernels: a tensor is not contiguous, or of another dtype than was compiled for");
    return static_cast<T*>(first);
}

template <class T>
T* made(std::initializer_list<int64_t> sizes, AtenTensorHandle* result) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes.begin()[d];
    check(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(), strides.data(), type(static_cast<T*>(nullptr)),
                                   aoti_torch_device_type_cpu(), 0, result));
    return data<T>(*result);
}

int64_t threads() {
    uint32_t n = 1;
    check(torch_get_num_threads(&n));
    return n;
}

// What a kernel returned, unless it found too little memory.
int64_t done(int64_t result) {
    if (result == INT64_MIN) throw std::bad_alloc();  // OUT_OF_MEMORY of parallel.h
    return result;
}

void check_site(int64_t wrong) {
    if (done(wrong) >= 0) throw std::runtime_error("bevfn's kernels: voxel " + std::to_string(wrong) + " lies outside the grid");
}

}  // namespace

extern "C" {

AOTITorchError aoti_torch_cpu_sparse_conv(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle table,
                                          AtenTensorHandle* y) {
    const int64_t K = size(weight, 0), channels_in = size(weight, 1), channels_out = size(weight, 2);
    const int64_t V = size(x, 0), W = size(table, 1), strides[] = {channels_in * channels_out, channels_out, 1};
    const float* w = data<float>(weight);
    float* sums = made<float>({W, channels_out}, y);
    if (done(sparse_conv(data<float>(x), w, strides, data<int32_t>(table), K, V, W, channels_in, channels_out, sums, threads())))
        throw std::runtime_error("bevfn's kernels: a table entry is beyond the features' rows");
    return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_cpu_submanifold_neighbours(AtenTensorHandle coords, AtenTensorHandle valid, const int64_t* kernel,
                                                     int64_t, const int64_t* grid, int64_t, const int64_t*,
                                                     AtenTensorHandle* table) {
    const int64_t V = size(coords, 0), K = kernel[0] * kernel[1] * kernel[2];
    int32_t* rows = made<int32_t>({K, V}, table);
    check_site(submanifold(data<int32_t>(coords), data<uint8_t>(valid), V, kernel, grid, rows, threads()));
    return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_cpu_strided_neighbours(AtenTensorHandle coords, AtenTensorHandle valid, const int64_t* kernel, int64_t,
                                                 const int64_t* stride, int64_t, const int64_t* padding, int64_t,
                                                 const int64_t* grid, int64_t, int64_t capacity, int64_t batch,
                                                 AtenTensorHandle* out_coords, AtenTensorHandle* out_valid,
                                                 AtenTensorHandle* table, AtenTensorHandle* inverse, AtenTensorHandle* found) {
    const int64_t V = size(coords, 0), K = kernel[0] * kernel[1] * kernel[2];
    int64_t out_grid[3];
    for (int a = 0; a < 3; ++a) out_grid[a] = (grid[a] + 2 * padding[a] - kernel[a]) / stride[a] + 1;
    int32_t *sites = made<int32_t>({capacity, 4}, out_coords), *count = made<int32_t>({}, found);
    int32_t *rows = made<int32_t>({K, capacity}, table), *back = made<int32_t>({K, V}, inverse);
    uint8_t* active = made<uint8_t>({capacity}, out_valid);
    check_site(strided(data<int32_t>(coords), data<uint8_t>(valid), V, kernel, stride, padding, grid, out_grid, capacity, batch,
                       sites, active, rows, back, count, threads()));
    return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_cpu_voxelize(AtenTensorHandle points, AtenTensorHandle valid, const double* lower, int64_t,
                                       const double* size_m, int64_t, const int64_t* grid, int64_t, int64_t max_points,
                                       int64_t max_voxels, AtenTensorHandle* features, AtenTensorHandle* coords,
                                       AtenTensorHandle* count, AtenTensorHandle* found) {
    const int64_t B = size(points, 0), P = size(points, 1), C = size(points, 2);
    float corner[3], extent[3];
    std::copy(lower, lower + 3, corner);
    std::copy(size_m, size_m + 3, extent);
    float* means = made<float>({B, max_voxels, C}, features);
    int32_t *cells = made<int32_t>({B, max_voxels, 3}, coords), *kept = made<int32_t>({B, max_voxels}, count);
    done(voxelize(data<float>(points), data<uint8_t>(valid), B, P, C, corner, extent, grid, max_points, max_voxels, means, cells,
                  kept, made<int32_t>({B}, found), threads()));
    return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_cpu_voxel_pool(AtenTensorHandle depth, AtenTensorHandle context, AtenTensorHandle cell,
                                         int64_t num_cells, AtenTensorHandle* sums) {
    const int64_t M = size(depth, 0), D = size(depth, 1), H = size(depth, 2), W = size(depth, 3), C = size(context, 3);
    float* out = made<float>({num_cells, C}, sums);
    done(voxel_pool_forward(data<float>(depth), data<float>(context), data<int32_t>(cell), out, M, D, H, W, C, num_cells,
                            threads()));
    return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_cpu_deform_attn(AtenTensorHandle value, AtenTensorHandle locations, AtenTensorHandle weights,
                                          AtenTensorHandle* mask, const int64_t* sizes, int64_t levels2,
                                          AtenTensorHandle* attended) {
    const int64_t B = size(value, 0), h = size(value, 2), d = size(value, 3), Q = size(weights, 1), P = size(weights, 4);
    std::vector<int64_t> numbers = {B, Q, h, d, P, levels2 / 2};
    numbers.insert(numbers.end(), sizes, sizes + levels2);
    const bool* attends = mask ? reinterpret_cast<const bool*>(data<uint8_t>(*mask)) : nullptr;
    float* out = made<float>({B, Q, h * d}, attended);
    done(deform_attn_forward_float(data<float>(value), data<float>(locations), data<float>(weights), attends, out,
                                   numbers.data(), threads()));
    return AOTI_TORCH_SUCCESS;
}

}
