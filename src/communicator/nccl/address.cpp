#include "communicator/nccl/address.h"

#include <c10/util/StringUtil.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <sstream>
#include <stdexcept>

namespace anabranch {
namespace {

using Found = std::unique_ptr<addrinfo, decltype(&freeaddrinfo)>;

/// Throws std::runtime_error if there is none.
Found look_up(const std::string& host, int flags) {
  addrinfo hints = {};
  hints.ai_flags = flags;
  hints.ai_socktype = SOCK_DGRAM;
  addrinfo* found = nullptr;
  const int error = getaddrinfo(host.c_str(), nullptr, &hints, &found);
  if (error != 0) {
    throw std::runtime_error("there is no address of '" + host + "': " + gai_strerror(error));
  }
  return {found, &freeaddrinfo};
}

std::string in_numbers(const sockaddr* address, socklen_t length) {
  char text[NI_MAXHOST] = {};
  const int error = getnameinfo(address, length, text, sizeof(text), nullptr, 0, NI_NUMERICHOST);
  if (error != 0) {
    throw std::runtime_error(std::string("getnameinfo failed: ") + gai_strerror(error));
  }
  return text;
}

/// The addresses that this host's name leads to, in numbers; none where it leads nowhere.
std::vector<std::string> addresses_of_host_name() {
  char name[256] = {};
  std::vector<std::string> addresses;
  try {
    if (gethostname(name, sizeof(name) - 1) == 0) {
      const Found found = look_up(name, 0);
      for (const addrinfo* one = found.get(); one != nullptr; one = one->ai_next) {
        addresses.push_back(in_numbers(one->ai_addr, one->ai_addrlen));
      }
    }
  } catch (const std::runtime_error&) {
    // Its devices have addresses all the same.
  }
  return addresses;
}

bool is_wanted(const std::string& name, const std::string& wanted) {
  const bool but_these = wanted.starts_with('^');
  const bool whole = wanted.substr(but_these ? 1 : 0).starts_with('=');
  std::istringstream list(wanted.substr((but_these ? 1 : 0) + (whole ? 1 : 0)));
  bool listed = false;
  for (std::string one; std::getline(list, one, ',');) {
    listed = listed || (whole ? name == one : name.starts_with(one));
  }
  return listed != but_these;
}

}  // namespace

SocketAddress::SocketAddress(const std::string& host, int port) {
  const Found found = look_up(host, AI_NUMERICHOST);
  std::memcpy(&storage_, found->ai_addr, found->ai_addrlen);
  length_ = found->ai_addrlen;
  const auto network_port = htons(static_cast<uint16_t>(port));
  if (family() == AF_INET6) {
    reinterpret_cast<sockaddr_in6&>(storage_).sin6_port = network_port;
  } else {
    reinterpret_cast<sockaddr_in&>(storage_).sin_port = network_port;
  }
}

SocketAddress SocketAddress::of_socket(int descriptor) {
  sockaddr_storage storage = {};
  socklen_t length = sizeof(storage);
  if (getsockname(descriptor, reinterpret_cast<sockaddr*>(&storage), &length) != 0) {
    throw std::runtime_error(std::string("getsockname failed: ") + std::strerror(errno));
  }
  return {storage, length};
}

int SocketAddress::port() const {
  return ntohs(family() == AF_INET6 ? reinterpret_cast<const sockaddr_in6&>(storage_).sin6_port
                                    : reinterpret_cast<const sockaddr_in&>(storage_).sin_port);
}

std::string SocketAddress::host() const { return in_numbers(get(), length_); }

bool SocketAddress::operator==(const SocketAddress& other) const {
  if (family() != other.family() || port() != other.port()) {
    return false;
  }
  if (family() == AF_INET6) {
    return std::memcmp(&reinterpret_cast<const sockaddr_in6&>(storage_).sin6_addr,
                       &reinterpret_cast<const sockaddr_in6&>(other.storage_).sin6_addr,
                       sizeof(in6_addr)) == 0;
  }
  return reinterpret_cast<const sockaddr_in&>(storage_).sin_addr.s_addr ==
         reinterpret_cast<const sockaddr_in&>(other.storage_).sin_addr.s_addr;
}

std::vector<Interface> network_interfaces() {
  ifaddrs* first = nullptr;
  if (getifaddrs(&first) != 0) {
    return {};
  }
  const std::unique_ptr<ifaddrs, decltype(&freeifaddrs)> owner(first, &freeifaddrs);
  std::vector<Interface> interfaces;
  for (const ifaddrs* one = first; one != nullptr; one = one->ifa_next) {
    const int family = one->ifa_addr == nullptr ? AF_UNSPEC : one->ifa_addr->sa_family;
    const bool ipv6 = family == AF_INET6;
    if ((family != AF_INET && !ipv6) || (one->ifa_flags & IFF_UP) == 0) {
      continue;
    }
    if (ipv6 &&
        IN6_IS_ADDR_LINKLOCAL(&reinterpret_cast<const sockaddr_in6*>(one->ifa_addr)->sin6_addr)) {
      continue;
    }
    const socklen_t length = ipv6 ? sizeof(sockaddr_in6) : sizeof(sockaddr_in);
    interfaces.push_back({one->ifa_name, in_numbers(one->ifa_addr, length), ipv6,
                          (one->ifa_flags & IFF_LOOPBACK) != 0});
  }
  return interfaces;
}

std::string loopback_address(const std::vector<Interface>& interfaces) {
  const auto is_ipv6_loopback = [](const Interface& one) { return one.is_loopback && one.is_ipv6; };
  const auto is_ipv4 = [](const Interface& one) { return !one.is_ipv6; };
  const bool ipv6_alone = std::none_of(interfaces.begin(), interfaces.end(), is_ipv4) &&
                          std::any_of(interfaces.begin(), interfaces.end(), is_ipv6_loopback);
  return ipv6_alone ? "::1" : "127.0.0.1";
}

std::optional<std::string> address_for_others(const std::vector<Interface>& interfaces,
                                              const std::string& wanted,
                                              const std::vector<std::string>& named, bool ipv6) {
  const Interface* best = nullptr;
  const auto rank_of = [&](const Interface& one) {
    if (!wanted.empty()) {
      return is_wanted(one.name, wanted) ? 3 : 0;
    }
    if (one.is_loopback) {
      return 0;
    }
    const bool is_named = std::find(named.begin(), named.end(), one.host) != named.end();
    return is_named ? 3 : is_wanted(one.name, "docker,virbr,veth,br-,cni") ? 1 : 2;
  };
  for (const Interface& one : interfaces) {
    if (one.is_ipv6 == ipv6 && rank_of(one) > (best == nullptr ? 0 : rank_of(*best))) {
      best = &one;
    }
  }
  return best == nullptr ? std::nullopt : std::optional(best->host);
}

std::optional<std::string> own_address(bool ipv6) {
  const char* wanted = std::getenv("NCCL_SOCKET_IFNAME");
  return address_for_others(network_interfaces(), wanted == nullptr ? "" : wanted,
                            addresses_of_host_name(), ipv6);
}

}  // namespace anabranch
