package health

import (
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testRules are the defaults of the configuration.
var testRules = Rules{Rise: 2, Fall: 2, Interval: time.Second, SuspiciousInterval: 250 * time.Millisecond}

const testTimeout = 1500 * time.Millisecond
