// max_sim on the CPU: cuts queries into panels and the work into tasks. The public function has checked the arguments.
//
// What no kernel can go below: 2 FLOP for each pair of valid tokens and channel, over the peak of multiply-adds. The
// backward pass multiplies nothing: of each document a query's token has one row, which the forward pass has named.
#include <ATen/EmptyTensor.h>
#include <ATen/TensorOperators.h>

#include <numeric>

#include "launch.h"
#include "max_sim_params.h"

namespace mmkernels {

MMK_TABLES(MaxSimKernels, max_sim_kernels)

namespace {

constexpr i64 kTasksPerThread = 4; // so many balance lengths, and what other processes take of the cores
constexpr double kTaskFlops = 4e6; // of a task at least: some 40 microseconds
constexpr i64 kMinTokens = 16;     // of a query's gradient in one task
constexpr i64 kColumns = 16;       // columns of a document's gradient in one task: a multiple of so many

// Lengths of sequences of `count` tokens; none given: of all of them.
std::vector<i64> lengths_of(const char* name, const OptionalTensor& lengths, i64 sequences, i64 count) {
  std::vector<i64> result(sequences, count);
  if (lengths.has_value()) {
    check_sizes(name, *lengths, {sequences});
    const Tensor values = lengths->to(at::kLong).contiguous();
    const i64* from = values.const_data_ptr<i64>();
    std::transform(from, from + sequences, result.begin(), [&](i64 n) { return std::clamp<i64>(n, 0, count); });
  }
  return result;
}

class MaxSimCall {
public:
  MaxSimParams p{};
  const MaxSimKernels& k = max_sim_kernels(); // once: another thread may choose another instruction set

  MaxSimCall(const Arguments& args, Tensor query, Tensor document)
      : query_(std::move(query)), document_(std::move(document)) {
    check_sizes("query", query_, {-1, -1, -1});
    check_sizes("document", document_, {-1, -1, query_.size(2)});
    TORCH_CHECK_TYPE(document_.scalar_type() == query_.scalar_type(), "document must have query's dtype");
    p.query = features_of(query_);
    p.document = features_of(document_);
    p.dim = query_.size(2);
    p.query_tokens = query_.size(1);
    p.document_tokens = document_.size(1);
    p.paired = args.flag("paired");
    TORCH_CHECK_VALUE(!p.paired || p.query.count == p.document.count, "pairs must have as many documents as queries");
    TORCH_CHECK_VALUE(p.query_tokens < INT32_MAX && p.document_tokens < INT32_MAX, "there are too many tokens");
    query_lengths_ = lengths_of("query_lengths", args.optional_tensor("query_lengths"), p.query.count, p.query_tokens);
    document_lengths_ =
        lengths_of("document_lengths", args.optional_tensor("document_lengths"), p.document.count, p.document_tokens);
    p.query_length = query_lengths_.data();
    p.document_length = document_lengths_.data();
  }

  i64 documents_of_query() const {
    return p.paired ? 1 : p.document.count;
  }
  // Whether each token of each query has a best token of each document.
  bool is_full() const {
    const auto is_shorter = [](i64 length) { return [=](i64 n) { return n < length; }; };
    return std::none_of(query_lengths_.begin(), query_lengths_.end(), is_shorter(p.query_tokens)) &&
           std::none_of(document_lengths_.begin(), document_lengths_.end(), is_shorter(1));
  }
  // Pairs of valid tokens.
  double pairs() const {
    double sum = 0.0;
    for (i64 n = 0; p.paired && n < p.query.count; ++n) {
      sum += static_cast<double>(query_lengths_[n]) * static_cast<double>(document_lengths_[n]);
    }
    const auto total = [](const std::vector<i64>& lengths) {
      return std::accumulate(lengths.begin(), lengths.end(), 0.0);
    };
    return p.paired ? sum : total(query_lengths_) * total(document_lengths_);
  }

private:
  Tensor query_, document_;
  std::vector<i64> query_lengths_, document_lengths_;
};

class BestTokens {
public:
  explicit BestTokens(const Arguments& args) : call_(args, args.tensor("query"), args.tensor("document")) {
    const i64 queries = p_.query.count, documents = call_.documents_of_query();
    scores_ = p_.paired ? at::detail::empty_cpu({queries}, at::kFloat)
                        : at::detail::empty_cpu({queries, documents}, at::kFloat);
    scores_.zero_();
    index_ = at::detail::empty_cpu({0}, at::kInt);
    if (args.flag("keep_index")) {
      index_ = p_.paired ? at::detail::empty_cpu({queries, p_.query_tokens}, at::kInt)
                         : at::detail::empty_cpu({queries, documents, p_.query_tokens}, at::kInt);
      if (!call_.is_full()) {
        index_.fill_(-1);
      }
    }
    p_.scores = scores_.mutable_data_ptr<float>();
    p_.index = args.flag("keep_index") ? index_.mutable_data_ptr<std::int32_t>() : nullptr;
  }

  std::tuple<Tensor, Tensor> run() {
    const double flops = 2.0 * call_.pairs() * static_cast<double>(p_.dim);
    if (flops > 0.0) {
      threads_ = threads_for(flops);
      cut_panels();
      cut_tasks();
      // A thread takes several small tasks at once.
      const i64 count = static_cast<i64>(tasks_.size()), wanted = threads_ * kTasksPerThread;
      const i64 fit = static_cast<i64>(kTaskFlops * static_cast<double>(count) / flops);
      const i64 each = std::max<i64>(1, std::min(fit, count / wanted));
      parallel_tasks((count + each - 1) / each, threads_, k_.scratch(p_), [&](i64 i, char* scratch) {
        for (i64 n = i * each; n < std::min(count, (i + 1) * each); ++n) {
          k_.best(p_, tasks_[n], scratch);
        }
        multiplied() += k_.take_multiplied();
      });
      add_parts();
    }
    return {scores_, index_};
  }

private:
  // The valid tokens of all queries fill panels one after the other; of pairs each query begins one.
  void cut_panels() {
    for (i64 query = 0; query < p_.query.count; ++query) {
      if (p_.paired) {
        first_panel_.push_back(static_cast<i64>(panels_.size()));
      }
      const i64 length = p_.query_length[query], first_run = static_cast<i64>(runs_.size());
      bool begins = p_.paired;
      for (i64 first = 0; first < length;) {
        if (begins || panels_.empty() || panels_.back().lanes == k_.panel) {
          panels_.push_back({static_cast<i64>(runs_.size()), 0, 0});
        }
        begins = false;
        TokenPanel& panel = panels_.back();
        const i64 count = std::min(length - first, k_.panel - panel.lanes);
        runs_.push_back({query, first, count, panel.lanes, nullptr});
        panel.lanes += count;
        panel.last = static_cast<i64>(runs_.size());
        first += count;
      }
      if (static_cast<i64>(runs_.size()) - first_run > 1) {
        cut_.push_back({first_run, static_cast<i64>(runs_.size())});
      }
    }
    if (p_.paired) {
      first_panel_.push_back(static_cast<i64>(panels_.size()));
    }
    i64 parts = 0;
    for (const Range& runs : cut_) {
      parts += runs.last - runs.first;
    }
    const i64 documents = call_.documents_of_query();
    parts_.resize(parts * documents);
    double* at = parts_.data();
    for (const Range& runs : cut_) {
      for (i64 n = runs.first; n < runs.last; ++n, at += documents) {
        runs_[n].parts = at;
      }
    }
    p_.runs = runs_.data();
    p_.panels = panels_.data();
  }

  void cut_tasks() {
    p_.task_panels = k_.task_panels(p_);
    if (p_.paired) {
      for (i64 n = 0; n < p_.query.count; ++n) {
        const i64 last = p_.document_length[n] > 0 ? first_panel_[n + 1] : first_panel_[n];
        add_tasks({first_panel_[n], last}, p_.task_panels, {n, n + 1});
      }
      return;
    }
    const i64 panels = static_cast<i64>(panels_.size()), wanted = threads_ == 1 ? 1 : threads_ * kTasksPerThread;
    const i64 rows = std::accumulate(p_.document_length, p_.document_length + p_.document.count, i64{0});
    const i64 most_runs = std::max<i64>(1, std::min(rows / k_.min_rows, p_.document.count));
    const i64 ranges = std::min(
        panels, std::max((panels + p_.task_panels - 1) / p_.task_panels, (wanted + most_runs - 1) / most_runs));
    p_.task_panels = (panels + ranges - 1) / ranges;
    const i64 runs = std::clamp<i64>((wanted + ranges - 1) / ranges, 1, most_runs);
    const i64 each = (rows + runs - 1) / runs;
    for (i64 first = 0, last = 0; first < p_.document.count; first = last) {
      for (i64 taken = 0; last < p_.document.count && taken < each; ++last) {
        taken += p_.document_length[last];
      }
      add_tasks({0, panels}, p_.task_panels, {first, last});
    }
  }

  struct Range {
    i64 first, last;
  };
  void add_tasks(Range panels, i64 each, Range documents) {
    for (i64 first = panels.first; first < panels.last; first += each) {
      tasks_.push_back({first, std::min(panels.last, first + each), documents.first, documents.last});
    }
  }

  // The scores of queries that are in several runs.
  void add_parts() {
    const i64 documents = call_.documents_of_query();
    for (const Range& runs : cut_) {
      float* to = p_.scores + runs_[runs.first].query * documents;
      for (i64 document = 0; document < documents; ++document) {
        double sum = 0.0;
        for (i64 n = runs.first; n < runs.last; ++n) {
          sum += runs_[n].parts[document];
        }
        to[document] = static_cast<float>(sum);
      }
    }
  }

  MaxSimCall call_;
  MaxSimParams& p_ = call_.p;
  const MaxSimKernels& k_ = call_.k;
  Tensor scores_, index_;
  int threads_ = 1;
  std::vector<TokenRun> runs_;
  std::vector<TokenPanel> panels_;
  std::vector<i64> first_panel_; // of pairs
  std::vector<Range> cut_;       // the runs of queries that are in several
  std::vector<double> parts_;    // of those runs, by document
  std::vector<MaxSimTask> tasks_;
};

std::tuple<Tensor, Tensor> max_sim(const Arguments& args) {
  return BestTokens(args).run();
}

Tensor with_dense_rows(const Tensor& x) {
  return x.size(-1) == 1 || x.stride(-1) == 1 ? x : x.contiguous();
}

std::tuple<Tensor, Tensor> max_sim_backward(const Arguments& args) {
  const Tensor query = with_dense_rows(args.tensor("query")), document = with_dense_rows(args.tensor("document"));
  MaxSimCall call(args, query, document);
  MaxSimParams& p = call.p;
  const i64 queries = p.query.count, documents = p.document.count;
  const Tensor &grad = args.tensor("grad_scores"), &index = args.tensor("index");
  TORCH_CHECK_TYPE(grad.scalar_type() == at::kFloat && index.scalar_type() == at::kInt,
                   "grad_scores must be float32 and index int32");
  TORCH_CHECK_VALUE(queries * p.query_tokens < INT32_MAX, "there are too many tokens");
  if (p.paired) {
    check_sizes("grad_scores", grad, {queries});
    check_sizes("index", index, {queries, p.query_tokens});
  } else {
    check_sizes("grad_scores", grad, {queries, documents});
    check_sizes("index", index, {queries, documents, p.query_tokens});
  }
  const Tensor indices = index.contiguous();
  p.index = const_cast<std::int32_t*>(indices.const_data_ptr<std::int32_t>());
  p.grad = grad.const_data_ptr<float>();
  p.grad_row = grad.stride(0);
  p.grad_column = p.paired ? 0 : grad.stride(1);
  const auto empty_like = [&](const Tensor& x, const char* need) {
    return args.flag(need) ? expect_writes(at::detail::empty_cpu(x.sizes(), x.scalar_type()))
                           : at::detail::empty_cpu({0}, x.scalar_type());
  };
  const Tensor of_query = empty_like(query, "need_query"), of_document = empty_like(document, "need_document");
  p.grad_query = static_cast<char*>(of_query.mutable_data_ptr());
  p.grad_document = static_cast<char*>(of_document.mutable_data_ptr());

  const i64 tokens = queries * p.query_tokens * call.documents_of_query();
  const int threads = threads_for(4.0 * static_cast<double>(tokens) * static_cast<double>(p.dim));
  const i64 wanted = threads == 1 ? 1 : threads * kTasksPerThread;
  const auto share = [&](i64 whole, i64 count, i64 least) { // of each of `count` in a task
    const i64 pieces = std::max<i64>(1, wanted / std::max<i64>(count, 1));
    return std::max<i64>(least, ((whole + pieces - 1) / pieces + least - 1) / least * least);
  };
  const i64 columns = share(p.dim, documents, kColumns), rows = share(p.query_tokens, queries, kMinTokens);
  const i64 slices = (p.dim + columns - 1) / columns, pieces = (p.query_tokens + rows - 1) / rows;
  const i64 of_documents = args.flag("need_document") ? documents * slices : 0;
  const i64 of_queries = args.flag("need_query") ? queries * pieces : 0;
  parallel_tasks(of_documents + of_queries, threads, call.k.document_scratch(p), [&](i64 task, char* scratch) {
    if (task < of_documents) {
      const i64 first = task % slices * columns;
      call.k.document_gradient(p, {task / slices, first, std::min(p.dim, first + columns)}, scratch);
    } else {
      const i64 n = task - of_documents, first = n % pieces * rows;
      call.k.query_gradient(p, n / pieces, first, std::min(p.query_tokens, first + rows));
    }
  });
  return {of_query, of_document};
}

} // namespace

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("max_sim_cpu", by_name<max_sim>());
  m.impl("max_sim_backward_cpu", by_name<max_sim_backward>());
}

} // namespace mmkernels
