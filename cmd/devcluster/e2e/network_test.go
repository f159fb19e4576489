package e2e

import (
	"net"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// commands runs commands, one a line, and wants all of them to succeed.
func commands(t *testing.T, lines ...string) {
	t.Helper()
	for _, line := range lines {
		words := strings.Fields(line)
		if out, err := exec.Command(words[0], words[1:]...).CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", line, err, out)
		}
	}
}

// Faults of the network between the balancer and one apiserver of three: no read fails,
// no event is lost, and nobody waits for long.
func TestNetworkFaults(t *testing.T) {
	needNamespace(t)
	needTool(t, "iptables")
	victim := shared.Apiserver(3)
	host, port, err := net.SplitHostPort(victim.Address)
	if err != nil {
		t.Fatal(err)
	}
	to, from := "-d "+host+" -p tcp --dport "+port, "-s "+host+" -p tcp --sport "+port
	const lossy = " -m statistic --mode random --probability 0.03 -j DROP"
	tests := []struct {
		name        string
		begin, undo []string
		gone        bool // the balancer is to give the backend up
		maxGap      time.Duration
	}{
		{"black hole",
			[]string{"iptables -I INPUT " + to + " -j DROP", "iptables -I INPUT " + from + " -j DROP"},
			[]string{"iptables -D INPUT " + to + " -j DROP", "iptables -D INPUT " + from + " -j DROP"}, true, 6 * time.Second},
		{"one direction only",
			[]string{"iptables -I INPUT " + from + " -j DROP"},
			[]string{"iptables -D INPUT " + from + " -j DROP"}, true, 6 * time.Second},
		{"resets",
			[]string{"iptables -I INPUT " + to + " -j REJECT --reject-with tcp-reset"},
			[]string{"iptables -D INPUT " + to + " -j REJECT --reject-with tcp-reset"}, true, 3 * time.Second},
		{"packet loss",
			[]string{"iptables -I INPUT " + to + lossy, "iptables -I INPUT " + from + lossy},
			[]string{"iptables -D INPUT " + to + lossy, "iptables -D INPUT " + from + lossy}, false, 6 * time.Second},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			allReady(t)
			l := startLoad(t, 9)
			name := strings.ReplaceAll(tt.name, " ", "-")
			l.write(t, shared.Apiserver(1), "before-"+name, 5)
			undone := false
			undo := func() {
				if !undone {
					commands(t, tt.undo...)
				}
				undone = true
			}
			t.Cleanup(func() {
				undo()
				allReady(t)
			})
			commands(t, tt.begin...)
			l.write(t, shared.Apiserver(1), "during-"+name, 50)
			if tt.gone {
				eventually(t, 10*time.Second, "the balancer has given the backend up", func() error { return stateIsNot("ready", 3) })
			} else {
				time.Sleep(8 * time.Second)
			}
			l.write(t, shared.Apiserver(1), "later-"+name, 5)
			undo()
			l.end(t, tt.maxGap)
		})
	}
}
