#pragma once

#ifdef __CUDACC__
#define ANABRANCH_ON_BOTH __host__ __device__
#else
#define ANABRANCH_ON_BOTH
#endif

namespace anabranch::tiles {

/// The units of work of one of several clusters, first to last: plain C++, to be tested without a GPU. Cluster c
/// takes units c, c + clusters, ... Where units fall in length (`falling`), whoever took the longest of the
/// first round takes the shortest of each further one.
class UnitOrder {
 public:
  ANABRANCH_ON_BOTH UnitOrder(int cluster, int clusters, bool falling)
      : clusters_(clusters),
        unit_(cluster),
        step_(falling ? 2 * (clusters - cluster) - 1 : clusters) {}

  ANABRANCH_ON_BOTH int unit() const { return unit_; }
  ANABRANCH_ON_BOTH void advance() {
    unit_ += step_;
    step_ = clusters_;
  }

 private:
  int clusters_;
  int unit_;
  int step_;
};

}  // namespace anabranch::tiles
