// The Python binding: abste.runtime._native. It owns threads and memory, which the C runtime does not.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#ifdef _WIN32
#include <malloc.h>
#include <process.h>
#define getpid _getpid
#else
#include <unistd.h>
#endif

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#include "abste.h"

namespace nb = nanobind;

namespace {

// A moment of looking whether something has come true, before a thread goes to sleep: waking it takes longer than many a node.
template <class Condition> bool soon(Condition condition) {
    for (int k = 0; k < 4000; ++k) {
        if (condition())
            return true;
#if defined(__x86_64__) || defined(_M_X64)
        _mm_pause();
#elif defined(__aarch64__) && !defined(_MSC_VER)
        __asm__ __volatile__("yield");
#endif
    }
    return false;
}

// Threads that wait for work. One call uses them at a time; a second one that comes meanwhile works alone.
class Pool {
  public:
    static Pool &shared() {
        static std::mutex guard;
        static Pool *pool = nullptr;
        std::lock_guard<std::mutex> lock(guard);
        if (!pool || pool->process_ != getpid()) // a forked process has none of its parent's threads
            pool = new Pool();                   // never destroyed: its threads may outlive the interpreter
        return *pool;
    }

    // The threads are taken until the returned lock goes; it holds nothing where they are busy.
    std::unique_lock<std::mutex> take(unsigned threads) {
        std::unique_lock<std::mutex> lock(taken_, std::try_to_lock);
        if (lock.owns_lock()) {
            limit_ = threads;
            while (workers_.size() + 1 < threads) {
                const unsigned number = static_cast<unsigned>(workers_.size());
                const uint64_t seen = state_ / JOB; // read here: the thread may start after the next call began
                workers_.emplace_back([this, number, seen] { work(number, seen); });
            }
        }
        return lock;
    }

    static void parallel_for(void *self, uint32_t count, abste_task task, void *argument) {
        static_cast<Pool *>(self)->run(count, task, argument);
    }

    // Whoever is awake takes part, and nobody is waited for who has not begun: another program may have the core.
    void run(uint32_t count, abste_task task, void *argument) {
        if (count < 2 || limit_ < 2) {
            if (count)
                task(argument, 0, count);
            return;
        }
        task_ = task;
        argument_ = argument;
        count_ = count;
        chunk_ = count / (4 * limit_) ? count / (4 * limit_) : 1;
        next_ = 0;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            state_ = (state_ / JOB + 1) * JOB + OPEN;
        }
        wake_.notify_all();
        parts();
        state_ -= OPEN;
        const auto alone = [this] { return state_ % OPEN == 0; };
        if (soon(alone))
            return;
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, alone);
    }

  private:
    // The state counts jobs, says whether one may be joined, and counts the workers that are at it.
    static constexpr uint64_t OPEN = uint64_t{1} << 32, JOB = 2 * OPEN;

    void parts() {
        for (;;) {
            const uint64_t begin = next_.fetch_add(chunk_);
            if (begin >= count_)
                return;
            const uint64_t end = begin + chunk_ < count_ ? begin + chunk_ : count_;
            task_(argument_, static_cast<uint32_t>(begin), static_cast<uint32_t>(end));
        }
    }

    void work(unsigned number, uint64_t seen) {
        for (;;) {
            const auto called = [&] { return state_ / JOB != seen; };
            if (!soon(called)) {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, called);
            }
            uint64_t state = state_;
            bool joined = false;
            while (state / OPEN % 2 && number + 1 < limit_ && !joined)
                joined = state_.compare_exchange_weak(state, state + 1);
            seen = state / JOB;
            if (!joined)
                continue;
            parts();
            if (--state_ % JOB == 0) {
                { std::lock_guard<std::mutex> lock(mutex_); }
                done_.notify_one();
            }
        }
    }

    const int process_ = getpid();
    std::mutex taken_, mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    std::atomic<uint64_t> state_{0}, next_{0};
    std::atomic<unsigned> limit_{1};
    abste_task task_ = nullptr;
    void *argument_ = nullptr;
    uint64_t count_ = 0, chunk_ = 1;
};

struct Free {
    void operator()(void *memory) const {
#ifdef _WIN32
        _aligned_free(memory);
#else
        std::free(memory);
#endif
    }
};

using Arena = std::unique_ptr<void, Free>;

Arena allocate(size_t bytes) {
    bytes = bytes ? (bytes + 63) / 64 * 64 : 64;
#ifdef _WIN32
    void *memory = _aligned_malloc(bytes, 64);
#else
    void *memory = std::aligned_alloc(64, bytes);
#endif
    if (!memory)
        throw std::bad_alloc();
    return Arena(memory);
}

using Bytes = nb::ndarray<nb::ro, const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Input = nb::ndarray<nb::ro, const float, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<nb::c_contig, nb::device::cpu>;
using Times = nb::ndarray<uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Trace = std::tuple<uint32_t, int32_t, Output>;

class Model {
  public:
    explicit Model(Bytes data) : data_(std::move(data)) {
        uint32_t where = ABSTE_NONE;
        const abste_status status = abste_load(&model_, data_.data(), data_.size(), 0, &where);
        if (status != ABSTE_OK)
            throw nb::value_error(message(status, where).c_str());
    }

    // Memory that pack wants for the kernels of an instruction set of this machine.
    size_t packed_bytes(const std::string &name, uint32_t int8) const { return abste_packed_bytes(&model_, isa(name), int8); }

    // Once, before anything runs.
    void pack(const std::string &name, uint32_t int8) {
        const size_t bytes = packed_bytes(name, int8);
        packed_ = allocate(bytes);
        if (abste_pack(&model_, isa(name), int8, packed_.get(), bytes) != ABSTE_OK)
            throw nb::value_error("the weights could not be packed");
    }

    size_t arena_bytes() const { return abste_arena_bytes(&model_); }

    nb::list inputs() const {
        nb::list list;
        for (uint32_t i = 0; i < abste_input_count(&model_); ++i)
            list.append(value(i));
        return list;
    }

    nb::list outputs() const {
        nb::list list;
        for (uint32_t i = 0; i < abste_output_count(&model_); ++i)
            list.append(value(abste_output(&model_, i)));
        return list;
    }

    // (name, operation, shape of what it writes, names of its steps, bits of a weight, weights, macs, work, bits of an input,
    // kind of its first step or -1)
    nb::list nodes() const {
        nb::list list;
        for (uint32_t i = 0; i < abste_node_count(&model_); ++i) {
            abste_node_info info;
            abste_node(&model_, i, &info);
            nb::list steps;
            for (uint32_t step = 0; step < info.step_count; ++step)
                steps.append(text(abste_step_name(&model_, i, step)));
            list.append(nb::make_tuple(text(info.name), nb::str(info.operation), value(info.out), nb::tuple(steps),
                                       info.weight_bits, info.weight_count, info.macs, info.work, info.input_bits,
                                       abste_step_kind(&model_, i, 0)));
        }
        return list;
    }

    nb::object normalization() const {
        const float *numbers = abste_normalization(&model_);
        if (!numbers)
            return nb::none();
        abste_value_info info;
        abste_value(&model_, 0, &info);
        nb::list list;
        for (uint32_t i = 0; i < 2 * info.c; ++i)
            list.append(numbers[i]);
        return list;
    }

    nb::object classes() const {
        size_t size = 0;
        const char *text = abste_classes(&model_, &size);
        return text ? nb::object(nb::bytes(text, size)) : nb::object(nb::none());
    }

    nb::object metadata() const {
        size_t size = 0;
        const char *text = abste_metadata(&model_, &size);
        return text ? nb::object(nb::bytes(text, size)) : nb::object(nb::none());
    }

    // Arrays hold whole batches; Python has checked their shapes and types. Where `times` is given, it gets nanoseconds summed over
    // the batch: of each node, and behind them of what lies around these. Images then run one by one, for threads to share.
    void run(const std::vector<Input> &inputs, const std::vector<Output> &outputs, size_t batch, bool nhwc, unsigned threads,
             const std::vector<Trace> &traces, const std::optional<Times> &times) const {
        Batch job{*this, {}, {}, traces, nhwc ? ABSTE_NHWC : ABSTE_NCHW, batch};
        Stopwatch watch{times ? times->data() : nullptr, abste_node_count(&model_)};
        if (times && times->size() != watch.nodes + 1)
            throw nb::value_error("times must hold a number for each node, and one more");
        for (const Input &input : inputs)
            job.inputs.push_back(input.data());
        for (const Output &output : outputs)
            job.outputs.push_back(static_cast<float *>(output.data()));
        for (uint32_t i = 0; i < abste_input_count(&model_); ++i)
            job.sizes.push_back(size(i));
        for (uint32_t i = 0; i < abste_output_count(&model_); ++i)
            job.output_sizes.push_back(size(abste_output(&model_, i)));
        for (const Trace &trace : traces)
            job.trace_sizes.push_back(batch ? std::get<2>(trace).size() / batch : 0);
        nb::gil_scoped_release release;
        Pool &pool = Pool::shared();
        std::unique_lock<std::mutex> lock;
        if (threads > 1)
            lock = pool.take(threads);
        if (!lock.owns_lock() || batch < threads || times) {
            // Few images: the threads share the rows of each.
            Arena arena = allocate(arena_bytes());
            for (size_t i = 0; i < batch; ++i)
                job.image(i, arena.get(), lock.owns_lock() ? &pool : nullptr, times ? &watch : nullptr);
        } else {
            pool.run(static_cast<uint32_t>(batch), Batch::part, &job);
        }
        if (job.status != ABSTE_OK)
            throw nb::value_error(abste_message(static_cast<abste_status>(job.status.load())));
    }

  private:
    struct Stopwatch {
        using Clock = std::chrono::steady_clock;

        uint64_t *times;
        uint32_t nodes;
        Clock::time_point last{};

        void start() { last = Clock::now(); }

        // Adds the time since the last one.
        void lap(uint32_t index) {
            const Clock::time_point now = Clock::now();
            times[index] += static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(now - last).count());
            last = now;
        }

        static void done(void *self, uint32_t node) {
            Stopwatch &watch = *static_cast<Stopwatch *>(self);
            watch.lap(node == ABSTE_NONE ? watch.nodes : node);
        }
    };

    struct Batch {
        const Model &model;
        std::vector<const float *> inputs;
        std::vector<float *> outputs;
        const std::vector<Trace> &traces;
        abste_layout layout;
        size_t count;
        std::vector<size_t> sizes{}, output_sizes{}, trace_sizes{};
        std::atomic<int> status{ABSTE_OK};

        static void part(void *self, uint32_t begin, uint32_t end) noexcept {
            Batch &job = *static_cast<Batch *>(self);
            try {
                Arena arena = allocate(job.model.arena_bytes());
                for (uint32_t i = begin; i < end; ++i)
                    job.image(i, arena.get(), nullptr, nullptr);
            } catch (const std::bad_alloc &) {
                job.status = ABSTE_ERROR_ARENA;
            }
        }

        void image(size_t i, void *arena, Pool *pool, Stopwatch *watch) {
            std::vector<const float *> in;
            std::vector<float *> out;
            std::vector<abste_trace> marks;
            for (size_t k = 0; k < inputs.size(); ++k)
                in.push_back(inputs[k] + i * sizes[k]);
            for (size_t k = 0; k < outputs.size(); ++k)
                out.push_back(outputs[k] + i * output_sizes[k]);
            for (size_t k = 0; k < traces.size(); ++k) // int32 and float32 are both four bytes wide
                marks.push_back({std::get<0>(traces[k]), std::get<1>(traces[k]),
                                 static_cast<char *>(std::get<2>(traces[k]).data()) + 4 * i * trace_sizes[k]});
            abste_run_arguments arguments = {};
            arguments.arena = arena;
            arguments.arena_bytes = model.arena_bytes();
            arguments.inputs = in.data();
            arguments.outputs = out.data();
            arguments.layout = layout;
            arguments.parallel_for = pool ? Pool::parallel_for : nullptr;
            arguments.pool = pool;
            arguments.traces = marks.data();
            arguments.trace_count = static_cast<uint32_t>(marks.size());
            arguments.progress = watch ? Stopwatch::done : nullptr;
            arguments.observer = watch;
            if (watch)
                watch->start();
            const abste_status result = abste_run(&model.model_, &arguments);
            if (watch)
                watch->lap(watch->nodes);
            if (result != ABSTE_OK)
                status = result;
        }
    };

    static abste_isa isa(const std::string &name) {
        for (int i = 0; i < ABSTE_ISA_COUNT; ++i)
            if (name == abste_isa_name(static_cast<abste_isa>(i)) && abste_has(static_cast<abste_isa>(i)))
                return static_cast<abste_isa>(i);
        throw nb::value_error("this machine has no such instruction set");
    }

    static std::string message(abste_status status, uint32_t where) {
        std::string text = abste_message(status);
        if (where != ABSTE_NONE)
            text += " (number " + std::to_string(where) + ")";
        return text;
    }

    size_t size(uint32_t index) const {
        abste_value_info info;
        abste_value(&model_, index, &info);
        return size_t(info.h) * info.w * info.c;
    }

    // (name, rank, (h, w, c))
    nb::tuple value(uint32_t index) const {
        abste_value_info info;
        abste_value(&model_, index, &info);
        return nb::make_tuple(text(info.name), info.rank, nb::make_tuple(info.h, info.w, info.c));
    }

    // A name of the file, which need not be UTF-8.
    static nb::object text(const char *name) {
        return nb::steal(PyUnicode_DecodeUTF8(name, static_cast<Py_ssize_t>(std::strlen(name)), "replace"));
    }

    Bytes data_; // keeps the file's memory alive
    abste_model model_;
    Arena packed_;
};

} // namespace

NB_MODULE(_native, module) {
    // The instruction sets of this machine, the fastest first.
    module.def("isas", [] {
        nb::list names;
        for (int i = ABSTE_ISA_COUNT; i-- > 0;)
            if (abste_has(static_cast<abste_isa>(i)))
                names.append(abste_isa_name(static_cast<abste_isa>(i)));
        return names;
    });
    // Those with kernels for integers of eight bits.
    module.def("int8_isas", [] {
        nb::list names;
        for (int i = 0; i < ABSTE_ISA_COUNT; ++i)
            if (abste_has_int8(static_cast<abste_isa>(i)))
                names.append(abste_isa_name(static_cast<abste_isa>(i)));
        return names;
    });
    module.attr("INT8_BINARY") = ABSTE_INT8_BINARY;
    module.attr("INT8_STEM") = ABSTE_INT8_STEM;
    module.attr("INT8_FLOAT") = ABSTE_INT8_FLOAT;
    nb::class_<Model>(module, "Model")
        .def(nb::init<Bytes>())
        .def("packed_bytes", &Model::packed_bytes, nb::arg("isa"), nb::arg("int8"))
        .def("pack", &Model::pack, nb::arg("isa"), nb::arg("int8"))
        .def_prop_ro("arena_bytes", &Model::arena_bytes)
        .def_prop_ro("inputs", &Model::inputs)
        .def_prop_ro("outputs", &Model::outputs)
        .def_prop_ro("nodes", &Model::nodes)
        .def_prop_ro("normalization", &Model::normalization)
        .def_prop_ro("classes", &Model::classes)
        .def_prop_ro("metadata", &Model::metadata)
        .def("run", &Model::run, nb::arg("inputs"), nb::arg("outputs"), nb::arg("batch"), nb::arg("nhwc"), nb::arg("threads"),
             nb::arg("traces"), nb::arg("times") = nb::none());
}
