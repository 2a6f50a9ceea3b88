// The network between simulated hosts: a switch between their taps with delay, rate and loss.
//
// usage: wire PID...   the process of each host; its network namespace gets a tap eth0, of MAC 02:00:00:00:00:NN
//
// Commands come on standard input, a line each; each is answered by a line. The wire ends with its input.
//   shape DELAY_US MBIT LOSS_PERCENT   one-way delay, rate of each host's port (0: unlimited), share of frames dropped
//   link HOST 0|1                      HOST counts from 0
//   counts                             per host: frames, bytes, frames with a TCP payload; all that it sent since asked
// netem would do, but not every kernel has it.

#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <random>
#include <sstream>
#include <string>
#include <vector>

namespace {

constexpr int MOST_AT_ONCE = 64;          // frames taken from one host before the others have their turn
constexpr int64_t LONGEST_QUEUE = 50'000'000;  // ns of a port's rate: what would wait longer is dropped, as in a switch
constexpr int ETHERNET = 14;

struct Frame {
    int64_t due;
    std::string bytes;
};

struct Host {
    int tap = -1;
    bool linked = true;
    int64_t busy_until = 0;
    std::deque<Frame> queue;  // on the way to this host
    uint64_t frames = 0, bytes = 0, payloads = 0;
};

struct Shape {
    int64_t delay = 0;
    double ns_per_byte = 0;
    double loss = 0;
};

int64_t now() {
    return std::chrono::steady_clock::now().time_since_epoch().count();
}

[[noreturn]] void fail(const char* what) {
    std::perror(what);
    std::exit(1);
}

int open_tap(const std::string& pid) {
    const int space = open(("/proc/" + pid + "/ns/net").c_str(), O_RDONLY | O_CLOEXEC);
    if (space < 0 || setns(space, CLONE_NEWNET) != 0) fail("setns");
    close(space);
    const int tap = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    ifreq request{};
    std::strcpy(request.ifr_name, "eth0");
    request.ifr_flags = IFF_TAP | IFF_NO_PI;
    if (tap < 0 || ioctl(tap, TUNSETIFF, &request) != 0) fail("/dev/net/tun");
    return tap;
}

// Whether a frame carries bytes of a TCP stream, and not only acknowledges some.
bool has_payload(const unsigned char* frame, int length) {
    if (length < ETHERNET + 40 || frame[12] != 8 || frame[13] != 0 || frame[ETHERNET + 9] != 6) return false;
    const unsigned char* ip = frame + ETHERNET;
    const int head = 4 * (ip[0] & 15), total = ip[2] << 8 | ip[3];
    return total > head + 4 * (ip[head + 12] >> 4);
}

class Wire {
  public:
    explicit Wire(const std::vector<std::string>& pids) {
        for (const auto& pid : pids) hosts_.emplace_back().tap = open_tap(pid);
        timer_ = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    }

    void run() {
        for (;;) {
            wait();
            if (!obey()) return;
            for (size_t i = 0; i < hosts_.size(); ++i) take(i);
            for (auto& host : hosts_) deliver(host);
        }
    }

  private:
    void wait() {
        std::vector<pollfd> polled;
        for (const auto& host : hosts_) polled.push_back({host.tap, POLLIN, 0});
        polled.push_back({timer_, POLLIN, 0});
        polled.push_back({0, POLLIN, 0});
        int64_t next = std::numeric_limits<int64_t>::max();
        for (const auto& host : hosts_)
            if (!host.queue.empty()) next = std::min(next, host.queue.front().due);
        itimerspec when{};
        if (next != std::numeric_limits<int64_t>::max())
            when.it_value = {next / 1'000'000'000, std::max<int64_t>(next % 1'000'000'000, 1)};
        timerfd_settime(timer_, TFD_TIMER_ABSTIME, &when, nullptr);
        poll(polled.data(), polled.size(), next <= now() ? 0 : -1);
        commands_wait_ = polled.back().revents != 0;
    }

    bool obey() {
        if (!commands_wait_) return true;
        char line[256];
        const ssize_t length = read(0, line, sizeof line - 1);
        if (length <= 0) return false;
        line[length] = 0;
        std::istringstream words(line);
        std::string name;
        words >> name;
        if (name == "shape") {
            double delay = 0, mbit = 0, percent = 0;
            words >> delay >> mbit >> percent;
            shape_ = {static_cast<int64_t>(delay * 1000), mbit > 0 ? 8000 / mbit : 0, percent / 100};
        } else if (name == "link") {
            size_t host = 0;
            int up = 0;
            words >> host >> up;
            hosts_.at(host).linked = up != 0;
        } else if (name == "counts") {
            for (auto& host : hosts_) {
                std::printf("%llu %llu %llu ", 1ULL * host.frames, 1ULL * host.bytes, 1ULL * host.payloads);
                host.frames = host.bytes = host.payloads = 0;
            }
        }
        std::puts("");
        std::fflush(stdout);
        return true;
    }

    void take(size_t from) {
        static unsigned char frame[1 << 16];
        for (int count = 0; count < MOST_AT_ONCE; ++count) {
            const ssize_t length = read(hosts_[from].tap, frame, sizeof frame);
            if (length < ETHERNET) return;
            if (!hosts_[from].linked) continue;
            ++hosts_[from].frames;
            hosts_[from].bytes += length;
            hosts_[from].payloads += has_payload(frame, static_cast<int>(length));
            if (shape_.loss > 0 && chance_(random_) < shape_.loss) continue;
            const bool for_all = frame[0] & 1;
            for (size_t to = 0; to < hosts_.size(); ++to)
                if (to != from && (for_all || frame[5] == to + 1)) send(hosts_[to], frame, length);
        }
    }

    void send(Host& to, const unsigned char* frame, ssize_t length) {
        const int64_t start = std::max(now(), to.busy_until);
        if (!to.linked || start - now() > LONGEST_QUEUE) return;
        to.busy_until = start + static_cast<int64_t>(shape_.ns_per_byte * static_cast<double>(length));
        to.queue.push_back({to.busy_until + shape_.delay, {reinterpret_cast<const char*>(frame), size_t(length)}});
    }

    static void deliver(Host& host) {
        while (!host.queue.empty() && host.queue.front().due <= now()) {
            const auto& bytes = host.queue.front().bytes;
            if (write(host.tap, bytes.data(), bytes.size()) < 0 && errno == EAGAIN) return;
            host.queue.pop_front();
        }
    }

    std::vector<Host> hosts_;
    Shape shape_;
    int timer_ = -1;
    bool commands_wait_ = false;
    std::mt19937 random_{1};
    std::uniform_real_distribution<double> chance_;
};

}  // namespace

int main(int count, char** words) {
    sched_param priority{};
    priority.sched_priority = 50;
    sched_setscheduler(0, SCHED_FIFO, &priority);  // delays are short: without it they wait for the ranks' turns
    Wire wire({words + 1, words + count});
    std::puts("ready");
    std::fflush(stdout);
    wire.run();
}
