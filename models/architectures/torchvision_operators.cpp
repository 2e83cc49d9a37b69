// nms and roi_align for the CPU, with roi_align's gradient: see torchvision_operators.py, which builds and loads this.
//
// Boxes are [n, 4] (x1, y1, x2, y2); regions of interest [n, 5] put the picture's number in front. A feature map is
// [pictures, channels, height, width]. float and double are computed as they are, everything else as float.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

at::ScalarType computed_as(const at::Tensor& values) {
  return values.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Greedy suppression by falling score; among equal scores the earlier box comes first.
at::Tensor nms(const at::Tensor& dets, const at::Tensor& scores, double threshold) {
  TORCH_CHECK(dets.dim() == 2 && dets.size(1) == 4, "nms: boxes must be [n, 4]");
  TORCH_CHECK(scores.dim() == 1 && scores.size(0) == dets.size(0), "nms: scores must be [n], one for each box");
  const int64_t n = dets.size(0);
  const auto order = std::get<1>(scores.sort(/*stable=*/true, /*dim=*/0, /*descending=*/true)).contiguous();
  const auto boxes = dets.to(at::kFloat).index_select(0, order).contiguous();
  const float* b = boxes.const_data_ptr<float>();
  const int64_t* rank = order.const_data_ptr<int64_t>();
  std::vector<float> area(n);
  for (int64_t i = 0; i < n; ++i) area[i] = (b[4 * i + 2] - b[4 * i]) * (b[4 * i + 3] - b[4 * i + 1]);
  std::vector<char> dropped(n, 0);
  std::vector<int64_t> kept;
  for (int64_t i = 0; i < n; ++i) {
    if (dropped[i]) continue;
    const float* p = b + 4 * i;
    kept.push_back(rank[i]);
    for (int64_t j = i + 1; j < n; ++j) {
      if (dropped[j]) continue;
      const float* q = b + 4 * j;
      const float w = std::max(0.f, std::min(p[2], q[2]) - std::max(p[0], q[0]));
      const float h = std::max(0.f, std::min(p[3], q[3]) - std::max(p[1], q[1]));
      const float both = w * h;
      if (both / (area[i] + area[j] - both) > threshold) dropped[j] = 1;
    }
  }
  auto result = at::empty({static_cast<int64_t>(kept.size())}, dets.options().dtype(at::kLong));
  std::copy(kept.begin(), kept.end(), result.mutable_data_ptr<int64_t>());
  return result;
}

// Four pixels (as offsets into a plane) and how much of each a bilinear sample takes.
template <typename T>
struct Sample {
  int64_t at[4];
  T weight[4];
};

// Which samples make each cell of one region. They are the same for every channel, so they are computed once.
template <typename T>
struct Region {
  int64_t picture;
  int64_t per_cell;  // samples in one cell
  std::vector<Sample<T>> samples;

  Region(const T* five, T scale, int64_t ph, int64_t pw, int64_t ratio, bool aligned, int64_t height, int64_t width) {
    picture = static_cast<int64_t>(five[0]);
    const T shift = aligned ? T(0.5) : T(0);
    const T left = five[1] * scale - shift, top = five[2] * scale - shift;
    T w = five[3] * scale - shift - left, h = five[4] * scale - shift - top;
    if (!aligned) {
      w = std::max(w, T(1));
      h = std::max(h, T(1));
    }
    const T cell_h = h / ph, cell_w = w / pw;
    const int64_t gh = std::max<int64_t>(ratio > 0 ? ratio : static_cast<int64_t>(std::ceil(cell_h)), 0);
    const int64_t gw = std::max<int64_t>(ratio > 0 ? ratio : static_cast<int64_t>(std::ceil(cell_w)), 0);
    per_cell = gh * gw;
    samples.reserve(ph * pw * per_cell);
    for (int64_t i = 0; i < ph; ++i)
      for (int64_t j = 0; j < pw; ++j)
        for (int64_t a = 0; a < gh; ++a)
          for (int64_t c = 0; c < gw; ++c)
            samples.push_back(sample(top + i * cell_h + (a + T(0.5)) * cell_h / gh,
                                     left + j * cell_w + (c + T(0.5)) * cell_w / gw, height, width));
  }

  // A point further than one pixel outside the map counts as zero; nearer ones take the border's value.
  static Sample<T> sample(T y, T x, int64_t height, int64_t width) {
    Sample<T> none{{0, 0, 0, 0}, {0, 0, 0, 0}};
    if (!(y >= -1 && y <= height && x >= -1 && x <= width)) return none;
    y = std::max(y, T(0));
    x = std::max(x, T(0));
    int64_t y0 = static_cast<int64_t>(y), x0 = static_cast<int64_t>(x), y1 = y0 + 1, x1 = x0 + 1;
    if (y0 >= height - 1) {
      y0 = y1 = height - 1;
      y = static_cast<T>(y0);
    }
    if (x0 >= width - 1) {
      x0 = x1 = width - 1;
      x = static_cast<T>(x0);
    }
    const T fy = y - y0, fx = x - x0;
    return {{y0 * width + x0, y0 * width + x1, y1 * width + x0, y1 * width + x1},
            {(1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx}};
  }
};

template <typename T>
void align(const T* source, const T* rois, T* target, int64_t n, int64_t pictures, int64_t channels, int64_t height,
           int64_t width, T scale, int64_t ph, int64_t pw, int64_t ratio, bool aligned) {
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const Region<T> region(rois + 5 * r, scale, ph, pw, ratio, aligned, height, width);
      TORCH_CHECK(region.picture >= 0 && region.picture < pictures,
                  "roi_align: a region names picture ", region.picture, " of a batch of ", pictures);
      const T share = T(1) / std::max<int64_t>(region.per_cell, 1);
      for (int64_t channel = 0; channel < channels; ++channel) {
        const T* plane = source + (region.picture * channels + channel) * height * width;
        T* out = target + (r * channels + channel) * ph * pw;
        const Sample<T>* next = region.samples.data();
        for (int64_t cell = 0; cell < ph * pw; ++cell) {
          T sum = 0;
          for (int64_t k = 0; k < region.per_cell; ++k, ++next)
            for (int corner = 0; corner < 4; ++corner) sum += next->weight[corner] * plane[next->at[corner]];
          out[cell] = sum * share;
        }
      }
    }
  });
}

template <typename T>
void spread(const T* grad, const T* rois, T* target, int64_t n, int64_t pictures, int64_t channels, int64_t height,
            int64_t width, T scale, int64_t ph, int64_t pw, int64_t ratio, bool aligned) {
  for (int64_t r = 0; r < n; ++r) {
    const Region<T> region(rois + 5 * r, scale, ph, pw, ratio, aligned, height, width);
    TORCH_CHECK(region.picture >= 0 && region.picture < pictures,
                "roi_align: a region names picture ", region.picture, " of a batch of ", pictures);
    const T share = T(1) / std::max<int64_t>(region.per_cell, 1);
    // Regions overlap, channels do not: threads may share a region, never a plane.
    at::parallel_for(0, channels, 64, [&](int64_t begin, int64_t end) {
      for (int64_t channel = begin; channel < end; ++channel) {
        T* plane = target + (region.picture * channels + channel) * height * width;
        const T* in = grad + (r * channels + channel) * ph * pw;
        const Sample<T>* next = region.samples.data();
        for (int64_t cell = 0; cell < ph * pw; ++cell) {
          const T value = in[cell] * share;
          for (int64_t k = 0; k < region.per_cell; ++k, ++next)
            for (int corner = 0; corner < 4; ++corner) plane[next->at[corner]] += next->weight[corner] * value;
        }
      }
    });
  }
}

at::Tensor roi_align(const at::Tensor& input, const at::Tensor& rois, double scale, int64_t ph, int64_t pw,
                     int64_t ratio, bool aligned) {
  TORCH_CHECK(input.dim() == 4, "roi_align: the feature map must be [pictures, channels, height, width]");
  TORCH_CHECK(rois.dim() == 2 && rois.size(1) == 5, "roi_align: rois must be [n, 5]");
  const auto type = computed_as(input);
  const auto image = input.to(type).contiguous();
  const auto boxes = rois.to(type).contiguous();
  auto output = at::empty({rois.size(0), image.size(1), ph, pw}, image.options());
  AT_DISPATCH_FLOATING_TYPES(type, "roi_align", [&] {
    align<scalar_t>(image.const_data_ptr<scalar_t>(), boxes.const_data_ptr<scalar_t>(),
                    output.mutable_data_ptr<scalar_t>(), rois.size(0), image.size(0), image.size(1), image.size(2),
                    image.size(3), static_cast<scalar_t>(scale), ph, pw, ratio, aligned);
  });
  return output.to(input.scalar_type());
}

at::Tensor roi_align_backward(const at::Tensor& grad, const at::Tensor& rois, double scale, int64_t ph, int64_t pw,
                              int64_t pictures, int64_t channels, int64_t height, int64_t width, int64_t ratio,
                              bool aligned) {
  TORCH_CHECK(rois.dim() == 2 && rois.size(1) == 5, "roi_align: rois must be [n, 5]");
  const auto type = computed_as(grad);
  const auto given = grad.to(type).contiguous();
  const auto boxes = rois.to(type).contiguous();
  auto result = at::zeros({pictures, channels, height, width}, given.options());
  AT_DISPATCH_FLOATING_TYPES(type, "roi_align_backward", [&] {
    spread<scalar_t>(given.const_data_ptr<scalar_t>(), boxes.const_data_ptr<scalar_t>(),
                     result.mutable_data_ptr<scalar_t>(), rois.size(0), pictures, channels, height, width,
                     static_cast<scalar_t>(scale), ph, pw, ratio, aligned);
  });
  return result.to(grad.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(torchvision, CPU, m) {
  m.impl("nms", nms);
  m.impl("roi_align", roi_align);
  m.impl("_roi_align_backward", roi_align_backward);
}
