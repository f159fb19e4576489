package e2e

import (
	"strings"
	"testing"
	"time"

	"apiserver-lb/cmd/devcluster/cluster"
)

// Faults of the network between the balancer and one apiserver of three: no read fails,
// no event is lost, and nobody waits for long.
func TestNetworkFaults(t *testing.T) {
	needNamespace(t)
	needTool(t, "iptables")
	victim := shared.Apiserver(3)
	tests := []struct {
		name   string
		begin  func() (cluster.Heal, error)
		gone   bool // the balancer is to give the backend up
		maxGap time.Duration
	}{
		{"black hole", victim.BlackHole, true, 6 * time.Second},
		{"one direction only", victim.Mute, true, 6 * time.Second},
		{"resets", victim.Refuse, true, 3 * time.Second},
		{"packet loss", func() (cluster.Heal, error) { return victim.Lose(0.03) }, false, 6 * time.Second},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			allReady(t)
			l := startLoad(t, 9)
			name := strings.ReplaceAll(tt.name, " ", "-")
			l.write(t, shared.Apiserver(1), "before-"+name, 5)
			heal, err := tt.begin()
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := heal(); err != nil {
					t.Error(err)
				}
				allReady(t)
			})
			l.write(t, shared.Apiserver(1), "during-"+name, 50)
			if tt.gone {
				eventually(t, 10*time.Second, "the balancer has given the backend up", func() error { return stateIsNot("ready", 3) })
			} else {
				time.Sleep(8 * time.Second)
			}
			l.write(t, shared.Apiserver(1), "later-"+name, 5)
			if err := heal(); err != nil {
				t.Fatal(err)
			}
			l.end(t, tt.maxGap)
		})
	}
}
