#pragma once

#include <sys/socket.h>

#include <optional>
#include <string>
#include <vector>

namespace anabranch {

/// An end of datagrams, of IPv4 or IPv6.
class SocketAddress {
 public:
  /// `host`: in numbers, as `host()` has it. Throws std::runtime_error for anything else.
  SocketAddress(const std::string& host, int port);
  /// What `descriptor` is bound to.
  static SocketAddress of_socket(int descriptor);
  /// What has come from the kernel.
  SocketAddress(const sockaddr_storage& storage, socklen_t length)
      : storage_(storage), length_(length) {}

  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage_); }
  socklen_t length() const { return length_; }
  int family() const { return storage_.ss_family; }
  int port() const;
  /// "10.0.0.7", "2001:db8::7"
  std::string host() const;
  bool operator==(const SocketAddress& other) const;

 private:
  sockaddr_storage storage_ = {};
  socklen_t length_ = 0;
};

/// One address of one of this host's network devices.
struct Interface {
  std::string name;
  std::string host;  ///< in numbers
  bool is_ipv6 = false;
  bool is_loopback = false;
};

/// Those that are up; no IPv6 address that is of its link alone.
std::vector<Interface> network_interfaces();

/// Of the loop device: 127.0.0.1 where there is IPv4.
std::string loopback_address(const std::vector<Interface>& interfaces);

/// At which address other hosts are to reach this one. `wanted` are the devices, as NCCL_SOCKET_IFNAME
/// names them: "eth,ib" by their first letters, "=eth0" by the whole name, "^docker" all others; where it
/// is empty, the one that the host's own name leads to (`named`, in numbers), else the first that is
/// neither the loop device nor a container's bridge.
std::optional<std::string> address_for_others(const std::vector<Interface>& interfaces,
                                              const std::string& wanted,
                                              const std::vector<std::string>& named, bool ipv6);

/// The same for this host as it is, with NCCL_SOCKET_IFNAME as it is set.
std::optional<std::string> own_address(bool ipv6);

}  // namespace anabranch
