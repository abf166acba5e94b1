// mmkernels._host: what the host CPU offers. Tensor-free, so that it builds in seconds and loads without torch.
// mmkernels/runtime/host_fallback.py answers the same questions where this module is not built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <map>
#include <set>
#include <string>
#include <thread>

#ifdef __linux__
#include <sched.h>
#endif

#include "common/isa.h"

namespace py = pybind11;

namespace {

const std::string kCpus = "/sys/devices/system/cpu/cpu";

// The kernel's sysfs and not sysconf: inside virtual machines sysconf's third level can be ten times too large.
std::map<std::string, std::int64_t> cache_sizes() {
  std::map<std::string, std::int64_t> sizes{{"l1d", 0}, {"l2", 0}, {"l3", 0}};
  for (int i = 0;; ++i) {
    const std::string folder = kCpus + "0/cache/index" + std::to_string(i);
    std::string level, type;
    std::int64_t kibibytes = 0;
    std::ifstream(folder + "/level") >> level;
    std::ifstream(folder + "/type") >> type;
    std::ifstream(folder + "/size") >> kibibytes; // "32K"
    if (level.empty()) {
      return sizes;
    }
    const auto entry = sizes.find(level == "1" ? "l1d" : "l" + level);
    if (type != "Instruction" && entry != sizes.end()) {
      entry->second = kibibytes * 1024;
    }
  }
}

int physical_cores() {
#ifdef __linux__
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) {
    std::set<std::string> cores; // each named by the list of its hardware threads
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (CPU_ISSET(cpu, &allowed)) {
        std::string threads = std::to_string(cpu); // without sysfs each CPU counts as a core
        std::ifstream(kCpus + threads + "/topology/thread_siblings_list") >> threads;
        cores.insert(threads);
      }
    }
    return static_cast<int>(cores.size());
  }
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

} // namespace

PYBIND11_MODULE(_host, m, py::mod_gil_not_used()) {
  m.doc() = "What the host CPU offers; tensor-free.";
  m.def("isa", &mmkernels::detect_isa,
        "Widest instruction set of this CPU and OS: avx512_bf16, avx512, avx2, neon or plain.");
  m.def("cache_sizes", &cache_sizes, "Bytes of the caches that one core sees, by l1d, l2, l3; 0 where unknown.");
  m.def("physical_cores", &physical_cores, "Cores that this process may run on; the threads of one core count once.");
  m.def("compiler", [] { return MMKERNELS_COMPILER; }, "Name and version of the compiler that built this module.");
}
