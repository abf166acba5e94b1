// One call of max_sim as the kernels see it: plain data, no torch. max_sim.cpp fills it in.
//
// A query's tokens are lanes of vectors, a document's are rows: of a tile of products each lane keeps its best row. The
// tokens of all queries fill panels one after the other, so that short queries leave no lanes empty.
#pragma once

#include "params.h"

namespace mmkernels {

// Tokens [first, first + count) of a query, in the lanes of a panel from `lane` on.
struct TokenRun {
  std::int64_t query, first, count, lane;
  double* parts; // by document, what the run adds to the query's scores; null: the run is the whole query
};

// Runs [first, last); `lanes` of the panel are in use.
struct TokenPanel {
  std::int64_t first, last, lanes;
};

struct MaxSimParams {
  std::int64_t dim = 0;
  Features query, document; // [count, tokens, dim]; rows of a token must be dense in the backward pass
  std::int64_t query_tokens = 0, document_tokens = 0;
  const std::int64_t *query_length = nullptr, *document_length = nullptr;
  bool paired = false; // query n meets document n alone

  // Forward.
  const TokenRun* runs = nullptr;
  const TokenPanel* panels = nullptr;
  std::int64_t task_panels = 0; // at most so many panels are a task's
  float* scores = nullptr;      // [queries, documents], or [queries] if paired

  // By query, document (unless paired) and token of the query: the document's token; -1: there is none.
  std::int32_t* index = nullptr; // null: not kept

  // Backward: the gradient of the scores with its strides in elements; dense results, null where not needed.
  const float* grad = nullptr;
  std::int64_t grad_row = 0, grad_column = 0;
  char *grad_query = nullptr, *grad_document = nullptr;
};

// Some panels against some documents.
struct MaxSimTask {
  std::int64_t first_panel, last_panel, first_document, last_document;
};

// Columns [first, last) of a document's gradient.
struct DocumentTask {
  std::int64_t document, first, last;
};

// The kernels of one instruction set.
struct MaxSimKernels {
  std::int64_t panel;    // lanes of a panel
  std::int64_t min_rows; // documents of a task have at least so many tokens, lest packing the panels costs too much
  std::int64_t (*take_multiplied)();
  std::int64_t (*task_panels)(const MaxSimParams&); // that stay in a core's cache
  std::int64_t (*scratch)(const MaxSimParams&);
  void (*best)(const MaxSimParams&, const MaxSimTask&, char* scratch);

  // Tokens [first, last) of one query.
  void (*query_gradient)(const MaxSimParams&, std::int64_t query, std::int64_t first, std::int64_t last);
  std::int64_t (*document_scratch)(const MaxSimParams&);
  void (*document_gradient)(const MaxSimParams&, const DocumentTask&, char* scratch);
};

} // namespace mmkernels
